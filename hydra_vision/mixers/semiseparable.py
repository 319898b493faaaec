"""Semiseparable mixers: the state space model of Mamba-2, causal, and the ways to make it bidirectional.

    SS(x)_i = sum_{j <= i} C_i . B_j exp(A sum_{k=j+1}^{i} dt_k) dt_j x_j

With shift they are the quasiseparable operator, without it one or two calls of the semiseparable one. Paper: Hwang
et al., "Hydra", NeurIPS 2024, tables 3 and 10.
"""

from typing import ClassVar, Optional, Set, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..ops import quasiseparable_matrix, quasiseparable_mix
from ..ops.dispatch import choose_backend
from ..ops.reference import accumulation_dtype
from ..ops.semiseparable import semiseparable_matrix, semiseparable_mix
from .base import MatrixMixer, Patterns
from .grid import TokenGrid
from .hydra import check_state_space, check_step_limit, init_dt_bias_

__all__ = ['Quasiseparable', 'Semiseparable']

VARIANTS = ('causal', 'add', 'mult', 'concat', 'add_diag', 'add_shift', 'quasiseparable')
_KERNEL_WIDTHS = (16, 32, 64, 128)  # head and state widths of the Triton kernels


class Semiseparable(MatrixMixer):
    """Matrix from the state space model SS, in one of these variants (SS_b: the same from right to left):

        causal            y = SS(v) + v                     (Mamba-2, with the causal convolution)
        add               y = SS(v) + SS_b(v) + v
        mult              y = SS(v) * SS_b(v) + v
        concat            y = [SS(v) + v, SS_b(v) + v]      v half as wide
        add_diag          y = SS(v) + SS_b(v) + D v
        add_shift         y = shift(SS(v)) + shift(SS_b(v)) + v
        quasiseparable    y = shift(SS(v)) + shift(SS_b(v)) + D v     (Hydra)

    with D_i = fc_D(v_i) + D, a free diagonal per head, and shift by one token in the direction of the scan. dt_bias and
    A are shared by the directions, B and C with ``share_bc``. ``mult`` is not linear in v given M: ``matrix`` returns
    the two directions' matrices one after the other along the heads (2H of them, to be multiplied after they are
    applied); for ``concat`` they are the heads themselves.

    Linear in L. Without shift each direction is a call of its own, which costs one direction in PyTorch; the Triton
    kernels compute both directions and so do twice the work there.

    The causal variant has a causal convolution by default, so that no token sees what comes after it; the others have
    the centred one of the family. With ``conv='centred'`` the matrix is causal and the module still sees
    d_conv // 2 tokens ahead.

    Args:
        d_model: Width of the tokens.
        d_state: State size N of each head.
        ngroups: Groups G of B and C; divides H.
        variant: See above.
        share_bc: Both directions share B and C.
        conv: 'centred' or 'causal'; None for 'causal' where the variant is.
        data_dependent: B, C and dt from the tokens; or B and C parameters of each token's place, dt of each head. At
            another grid B and C are resampled; decay stays a matter of tokens.
        dt_min: Smallest step size at initialisation.
        dt_max: Largest step size at initialisation.
        dt_init_floor: Lower bound of the initial step size.
        dt_limit: (min, max) to which dt is clamped after softplus.
        backend: As in ``quasiseparable_mix``.
        **wrapper: As in ``MatrixMixer``.

    Raises:
        ValueError: A size that does not fit, an unknown variant or backend.
    """

    patterns: ClassVar[Patterns] = {'noncausal self': {}, 'causal self': {'variant': 'causal'}}
    maskable = True

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        ngroups: int = 1,
        *,
        variant: str = 'add',
        share_bc: bool = False,
        conv: Optional[str] = None,
        data_dependent: bool = True,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: Tuple[float, float] = (0.0, float('inf')),
        backend: str = 'auto',
        device=None,
        dtype=None,
        **wrapper,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f'variant={variant!r}; allowed: {", ".join(map(repr, VARIANTS))}')
        if conv is None:
            conv = 'causal' if variant == 'causal' else 'centred'
        super().__init__(d_model, data_dependent, conv=conv, device=device, dtype=dtype, **wrapper)
        if variant == 'causal' and share_bc:
            raise ValueError("share_bc=True: variant='causal' has one direction, with nothing to share")
        if variant == 'concat' and self.nheads % 2:
            raise ValueError(f"variant='concat' needs an even number of heads, d_inner / headdim is {self.nheads}")
        heads = self.nheads // 2 if variant == 'concat' else self.nheads
        check_state_space(d_state, ngroups, heads, dt_min, dt_max, dt_limit, backend)
        self.d_state, self.ngroups, self.backend = d_state, ngroups, backend
        self.variant, self.share_bc = variant, share_bc
        self.dt_min, self.dt_max, self.dt_init_floor, self.dt_limit = dt_min, dt_max, dt_init_floor, tuple(dt_limit)
        self.directions = 1 if variant == 'causal' else 2
        self.shifted = variant in ('add_shift', 'quasiseparable')
        self.diagonal = variant in ('add_diag', 'quasiseparable')

        bc_dim = 2 * (1 if share_bc else self.directions) * ngroups * d_state
        if data_dependent:
            self._build(bc_dim, self.directions * heads, v_heads=heads)
        else:
            self._build(v_heads=heads)
        dd = {'device': device, 'dtype': dtype}
        self.dt_bias = nn.Parameter(torch.empty(heads, **dd))
        self.A_log = nn.Parameter(torch.empty(heads, **dd))
        if self.diagonal:
            self.D = nn.Parameter(torch.empty(heads, **dd))
            self.fc_D = nn.Linear(heads * self.headdim, heads, bias=False, **dd)
        if not data_dependent:
            self.BC = nn.Parameter(torch.empty(self.tokens.num_tokens, bc_dim, **dd))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the parameters that this module owns itself, as in ``Hydra``."""
        nn.init.zeros_(self.A_log)
        init_dt_bias_(self.dt_bias, self.dt_min, self.dt_max, self.dt_init_floor)
        if self.diagonal:
            nn.init.ones_(self.D)
        if not self.data_dependent:
            nn.init.xavier_normal_(self.BC)

    def no_weight_decay(self) -> Set[str]:
        return super().no_weight_decay() | {'A_log', 'dt_bias'} | ({'D'} if self.diagonal else set())

    def grid_parameters(self) -> Tuple[str, ...]:
        return () if self.data_dependent else ('BC',)

    def why_no_padding(self) -> Optional[str]:
        return check_step_limit(self.dt_limit[0]) or super().why_no_padding()

    def resample(self, name: str, value: Tensor, old: TokenGrid, new: TokenGrid) -> Tensor:
        value = old.tokens(value, new)
        if old.size == new.size:
            return value
        # columns [B, C] or [B_f, C_f, B_b, C_b]: B writes less per token where there are more tokens
        B, C = value.unflatten(-1, (-1, 2, self.ngroups * self.d_state)).unbind(-2)
        return torch.stack([B * (old.num_tokens / new.num_tokens), C], dim=-2).flatten(-3)

    def _terms(self, v: Tensor, extras: Tensor, tokens: Optional[TokenGrid]) -> Tuple:
        """A (H,); dt, B and C of each direction, a list; the diagonal (B, L, H) or None."""
        batch = extras.shape[0]  # of a trace for ONNX; v's, which was unflattened, is taken for a constant there
        L, H = v.shape[1:3]
        acc = accumulation_dtype(v.dtype)
        if self.data_dependent:
            BC, dt = extras.split([self.conv_extras, self.plain_extras], dim=-1)
            dt = dt.to(acc).unflatten(-1, (self.directions, H)) + self.dt_bias.to(acc)
        else:
            BC = self._at('BC', tokens).to(v.dtype).expand(batch, -1, -1)
            dt = self.dt_bias.to(acc).expand(batch, L, self.directions, H)
        dt = F.softplus(dt)
        if self.dt_limit != (0.0, float('inf')):
            dt = dt.clamp(*self.dt_limit)
        pairs = BC.unflatten(-1, (-1, 2, self.ngroups, self.d_state)).unbind(2)
        pairs = pairs * (self.directions // len(pairs))
        diagonal = None
        if self.diagonal:
            diagonal = self.fc_D(v.flatten(-2)).to(acc) + self.D.to(acc)
        scans = [(dt[:, :, n], *pair.unbind(2)) for n, pair in enumerate(pairs)]
        return -torch.exp(self.A_log.to(acc)), scans, diagonal

    def mix(self, v: Tensor, extras: Tensor, tokens: Optional[TokenGrid], valid: Optional[Tensor] = None) -> Tensor:
        A, scans, diagonal = self._terms(v, extras, tokens)  # the step sizes say what is valid
        P = v.shape[-1]
        x = self._widened(v)
        if self.shifted:
            (dt_f, B_f, C_f), (dt_b, B_b, C_b) = scans
            args = (self._widened(t) for t in (B_f, C_f, B_b, C_b))
            y = quasiseparable_mix(x, dt_f, dt_b, A, *args, diagonal, backend=self.backend)
            return y[..., :P]
        ys = []
        for reverse, (dt, B, C) in enumerate(scans):
            args = (self._widened(B), self._widened(C))
            ys.append(semiseparable_mix(x, dt, A, *args, reverse=bool(reverse), backend=self.backend)[..., :P])
        if self.variant == 'mult':
            return ys[0] * ys[1]
        if self.variant == 'concat':
            return torch.cat(ys, dim=2)
        y = ys[0] if self.variant == 'causal' else ys[0] + ys[1]
        if diagonal is not None:
            y = y + (diagonal.unsqueeze(-1) * v).to(y.dtype)
        return y

    def add_residual(self, y: Tensor, v: Tensor) -> Tensor:
        if self.diagonal:  # the free diagonal starts from D = 1
            return y
        return y + (torch.cat([v, v], dim=2) if self.variant == 'concat' else v)

    def dense(self, v: Tensor, extras: Tensor, tokens: Optional[TokenGrid]) -> Tensor:
        A, scans, diagonal = self._terms(v, extras, tokens)
        if self.shifted:
            (dt_f, B_f, C_f), (dt_b, B_b, C_b) = scans
            return quasiseparable_matrix(dt_f, dt_b, A, B_f, C_f, B_b, C_b, diagonal)
        Ms = [semiseparable_matrix(dt, A, B, C, reverse=bool(n)) for n, (dt, B, C) in enumerate(scans)]
        if self.variant in ('mult', 'concat'):
            return torch.cat(Ms, dim=1)
        M = sum(Ms)
        return M if diagonal is None else M + torch.diag_embed(diagonal.transpose(-1, -2))

    def _widened(self, t: Tensor) -> Tensor:
        """Zeros behind the last dimension up to a width that the kernels have, where it is they that compute."""
        width = next((n for n in _KERNEL_WIDTHS if n >= t.shape[-1]), t.shape[-1])
        if width == t.shape[-1] or choose_backend(self.backend, t.device) != 'triton':
            return t
        return F.pad(t, (0, width - t.shape[-1]))

    def extra_repr(self) -> str:
        return f'variant={self.variant!r}, d_state={self.d_state}, share_bc={self.share_bc}, {super().extra_repr()}'


class Quasiseparable(Semiseparable):
    """``Semiseparable(variant='quasiseparable')``. Data-dependent it is ``Hydra``, parameter by parameter.

    Args:
        d_model: Width of the tokens.
        d_state: State size N of each head.
        ngroups: Groups G of B and C; divides H.
        share_bc: Both directions share B and C, as they do in the released ablation.
        data_dependent: B, C and dt from the tokens, or parameters.
        dt_min: As in ``Semiseparable``.
        dt_max: As in ``Semiseparable``.
        dt_init_floor: As in ``Semiseparable``.
        dt_limit: As in ``Semiseparable``.
        backend: As in ``quasiseparable_mix``.
        **wrapper: As in ``MatrixMixer``.
    """

    hidden_arguments = ('variant',)
    patterns: ClassVar[Patterns] = {'noncausal self': {}}

    def __init__(self, d_model: int, d_state: int = 64, ngroups: int = 1, **kwargs) -> None:
        super().__init__(d_model, d_state, ngroups, variant='quasiseparable', **kwargs)
