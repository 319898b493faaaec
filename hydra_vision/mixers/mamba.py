"""Mamba's mixer (S6), causal, and Vim's, bidirectional. Names, shapes and initialisation of the released modules.

Papers: Gu, Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023,
https://arxiv.org/abs/2312.00752 (state-spaces/mamba, ``modules/mamba_simple.py``); Zhu et al., "Vision Mamba", ICML
2024, https://arxiv.org/abs/2401.09417 (hustvl/Vim, ``bimamba_type="v2"`` with ``if_divide_out``). State dicts move both
ways.
"""

import math
from typing import ClassVar, Optional, Set, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..ops.dispatch import check_backend_name
from ..ops.reference import accumulation_dtype
from ..ops.selective_scan import choose_scan_backend, selective_scan, selective_scan_matrix
from .base import Mixer, Patterns, check_sizes, convolved, is_plain, mask_projection
from .hydra import check_step_sizes, init_dt_bias_

__all__ = ['Mamba', 'Vim']


class StepProjection(nn.Module):
    """From the low-rank columns to the step size of each channel. No ``nn.Linear``: models initialise those anew.

    Weight U(-R^-1/2, R^-1/2), bias the inverse softplus of step sizes log-uniform in [dt_min, dt_max].
    """

    def __init__(
        self, rank: int, channels: int, dt_min: float, dt_max: float, dt_init_floor: float, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.dt_min, self.dt_max, self.dt_init_floor = dt_min, dt_max, dt_init_floor
        self.weight = nn.Parameter(torch.empty(channels, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        init_dt_bias_(self.bias, self.dt_min, self.dt_max, self.dt_init_floor)

    def forward(self, r: Tensor) -> Tensor:
        """r (B, L, R) -> step sizes (B, L, E) before softplus, in float32 or wider."""
        acc = accumulation_dtype(r.dtype)
        return F.linear(r, self.weight.to(r.dtype)).to(acc) + self.bias.to(acc)

    def extra_repr(self) -> str:
        return f'{self.weight.shape[1]}, {self.weight.shape[0]}'


class Mamba(Mixer):
    """Mamba's causal mixer, (B, L, d_model) -> (B, L, d_model), linear in L.

        x, z = in_proj(u);  x = SiLU(causal conv1d(x));  r, B, C = x_proj(x);  dt = softplus(dt_proj(r))
        y = selective scan of x with A = -exp(A_log), + D x
        out_proj(y * SiLU(z))

    Every channel is a head of width 1 with a state of its own.

    Args:
        d_model: Width of the tokens.
        d_state: State size N per channel.
        d_conv: Width of the depthwise causal convolution.
        expand: ``d_inner = expand * d_model``; need not be whole.
        dt_rank: Width R of what the step sizes are made of; None for d_model / 16, rounded up.
        dt_min: Smallest step size at initialisation (log-uniform in [dt_min, dt_max]).
        dt_max: Largest step size at initialisation.
        dt_init_floor: Lower bound of the initial step size.
        bias: Bias of the two outer projections.
        conv_bias: Bias of the convolution.
        backend: As in ``selective_scan``.

    Raises:
        ValueError: A size that does not fit, an unknown backend.
    """

    directions: ClassVar[Tuple[str, ...]] = ('',)
    patterns: ClassVar[Patterns] = {'causal self': {}}

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        *,
        dt_rank: Optional[int] = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        bias: bool = False,
        conv_bias: bool = True,
        backend: str = 'auto',
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        d_inner = round(expand * d_model)
        check_sizes(d_model=d_model, d_state=d_state, d_conv=d_conv, dt_rank=dt_rank, d_inner=d_inner)
        check_step_sizes(dt_min, dt_max)
        check_backend_name(backend)
        dd = {'device': device, 'dtype': dtype}
        self.d_model, self.d_state, self.d_inner, self.dt_rank = d_model, d_state, d_inner, dt_rank
        self.headdim, self.nheads = 1, d_inner
        self.backend = backend
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=bias, **dd)
        for suffix in self.directions:
            conv = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1, bias=conv_bias, **dd)
            setattr(self, f'conv1d{suffix}', conv)
            setattr(self, f'x_proj{suffix}', nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False, **dd))
            setattr(self, f'dt_proj{suffix}', StepProjection(dt_rank, d_inner, dt_min, dt_max, dt_init_floor, **dd))
            self.register_parameter(f'A{suffix}_log', nn.Parameter(torch.empty(d_inner, d_state, **dd)))
            self.register_parameter(f'D{suffix}', nn.Parameter(torch.empty(d_inner, **dd)))
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias, **dd)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the parameters that this module owns itself; its submodules have a ``reset_parameters`` each."""
        for suffix in self.directions:
            A_log = getattr(self, f'A{suffix}_log')
            A_log.copy_(torch.arange(1, self.d_state + 1, device=A_log.device).log().expand_as(A_log))
            nn.init.ones_(getattr(self, f'D{suffix}'))

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        return {
            name for suffix in self.directions for name in (f'A{suffix}_log', f'D{suffix}', f'dt_proj{suffix}.bias')
        }

    def why_no_padding(self) -> Optional[str]:
        return None

    def forward(self, u: Tensor, valid: Optional[Tensor] = None) -> Tensor:
        """Mix the tokens.

        Args:
            u: (B, L, d_model).
            valid: (B, L), False at padding at the end of the sequence; None for no padding.
        """
        x, z = mask_projection(self.in_proj(u), valid, 0).chunk(2, dim=-1)
        y = self._direction(x, '', valid)
        if len(self.directions) > 1:
            y = (y + self._direction(x, '_b', valid)) / 2
        return self.out_proj(y * F.silu(z))

    @torch.jit.ignore
    def matrix(self, u: Tensor) -> Tensor:
        """The matrices (B, d_inner, L, L), one per channel, of one direction applied to its convolved x.

        With D on the diagonal. Where there are two directions each has a convolution of its own: their matrices stand
        one after the other along the channels, to be averaged after they are applied. float32, for float64 input
        float64; O(d_inner L^2) memory.
        """
        x, _ = self.in_proj(u).chunk(2, dim=-1)
        Ms = []
        for suffix in self.directions:
            _, dt, A, B, C, D, bias = self._terms(x, suffix)
            dt = dt.to(A.dtype) if bias is None else dt.to(A.dtype) + bias
            M = selective_scan_matrix(F.softplus(dt), A, B, C, reverse=suffix == '_b')
            Ms.append(M + torch.diag_embed(D[:, None].expand(-1, u.shape[1])))
        return torch.cat(Ms, dim=1)

    def _terms(self, x: Tensor, suffix: str) -> Tuple[Optional[Tensor], ...]:
        """Of a direction: convolved x, dt before softplus (B, L, E), A (E, N), B, C (B, L, N), D (E,), and what is
        still to be added to dt: its bias (E,), or None."""
        acc = accumulation_dtype(x.dtype)
        conv, step = getattr(self, f'conv1d{suffix}'), getattr(self, f'dt_proj{suffix}')
        fused = choose_scan_backend(self.backend, x.device) == 'triton' and is_plain(conv, nn.Conv1d)
        if fused and conv.kernel_size[0] <= 4 and x.dtype != torch.float64:  # what the kernel has
            from ..ops.triton.causal_conv import causal_conv_silu  # lazily: Triton is looked for only where it runs

            x = causal_conv_silu(x, conv.weight, conv.bias, suffix == '_b')
        else:
            x = F.silu(convolved(conv, x, causal=True, reverse=suffix == '_b'))
        columns = getattr(self, f'x_proj{suffix}')(x)
        r, B, C = columns.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        A = -torch.exp(getattr(self, f'A{suffix}_log').to(acc))
        D = getattr(self, f'D{suffix}').to(acc)
        if is_plain(step, StepProjection):  # the scan adds the bias, in its own precision
            return x, F.linear(r, step.weight.to(r.dtype)), A, B, C, D, step.bias.to(acc)
        return x, step(r), A, B, C, D, None

    def _direction(self, x: Tensor, suffix: str, valid: Optional[Tensor] = None) -> Tensor:
        """(B, L, E) -> (B, L, E)."""
        x, dt, *others = self._terms(x, suffix)
        if valid is not None:
            dt = dt.masked_fill(~valid.unsqueeze(-1), -3e4)  # the step is zero then
        return selective_scan(x, dt, *others, softplus=True, reverse=suffix == '_b', backend=self.backend)

    def extra_repr(self) -> str:
        return f'd_state={self.d_state}, d_inner={self.d_inner}, dt_rank={self.dt_rank}, backend={self.backend!r}'


class Vim(Mamba):
    """Vim's bidirectional mixer: two scans of one x and z, each with its own convolution, projections and parameters.

        out_proj((S6(x) + flip(S6_b(flip(x)))) / 2 * SiLU(z))

    Args:
        d_model: Width of the tokens.
        **kwargs: As in ``Mamba``.
    """

    directions: ClassVar[Tuple[str, ...]] = ('', '_b')
    patterns: ClassVar[Patterns] = {'noncausal self': {}}

    def __init__(self, d_model: int, **kwargs) -> None:
        super().__init__(d_model, **kwargs)
