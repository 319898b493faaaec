"""The Hydra mixer: a bidirectional state space model as one quasiseparable matrix.

Paper: Hwang, Lahoti, Dao, Gu, "Hydra: Bidirectional State Space Models Through Generalized Matrix Mixers", NeurIPS
2024, https://arxiv.org/abs/2407.09941. Parameter names and shapes are those of the released module
(goombalab/hydra, ``hydra/modules/hydra.py``): state dicts move both ways.
"""

import math
from typing import Any, Final, Optional, Set, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..ops import quasiseparable_matrix
from ..ops.arguments import InnerArguments
from ..ops.dispatch import check_backend_name, is_exporting
from ..ops.inner import hydra_inner_late, mix_convolved, scale_rows, split_zxbcdt, unpack_convolved
from ..ops.reference import accumulation_dtype
from .base import (
    GatedMixer,
    GatedRMSNorm,
    check_packing,
    check_padding,
    check_sizes,
    convolved,
    in_whole_columns,
    is_plain,
    mask_projection,
)

__all__ = ['Hydra']

# torch.fx keeps an operator as one node: tracing into it would freeze shapes and backend. TorchScript calls it in
# Python for the same reason, by the name of an operator, so that what calls it can be saved. Who loads it imports
# hydra_vision first.
torch.fx.wrap('_hydra_inner')
torch.fx.wrap('_mix_convolved')
_SCHEMAS = (
    'hydra_inner_scripted(Tensor zxbcdt, Tensor conv_weight, Tensor? conv_bias, Tensor dt_bias, Tensor A_log, '
    'Tensor D, Tensor fc_D_weight, Tensor norm_weight, Tensor? init_states, int headdim, int d_state, int ngroups, '
    'bool share_bc, float dt_min, float dt_max, float eps, str backend) -> Tensor',
    'mix_convolved_scripted(Tensor xbc, Tensor dt, Tensor fc_D, Tensor dt_bias, Tensor A_log, Tensor D, '
    'Tensor? init_states, int headdim, int d_state, int ngroups, bool share_bc, float dt_min, float dt_max, '
    'str backend) -> Tensor',
)


def _untraced(t: Any) -> Any:
    """None for the placeholder that torch.fx makes of an argument, also where it was left out."""
    return None if isinstance(t, torch.fx.Proxy) else t


@torch.jit.ignore
def _hydra_inner(*arguments):
    """What the scripted operator takes: the fields of ``InnerArguments``, dt_limit as two numbers, the backend."""
    *front, dt_min, dt_max, eps, backend = arguments
    return hydra_inner_late(InnerArguments(*front, (dt_min, dt_max), eps), backend=backend, late=False)[0]


def _mix_convolved(
    xbc: Tensor,
    dt: Tensor,
    fc_D: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    init_states: Optional[Tensor],
    headdim: int,
    d_state: int,
    ngroups: int,
    share_bc: bool,
    dt_min: float,
    dt_max: float,
    backend: str,
) -> Tensor:
    if torch.jit.is_scripting():
        y: Tensor = torch.ops.hydra_vision.mix_convolved_scripted(
            xbc, dt, fc_D, dt_bias, A_log, D, init_states,
            headdim, d_state, ngroups, share_bc, dt_min, dt_max, backend,
        )  # fmt: skip
        return y
    else:
        return mix_convolved(
            xbc, dt, fc_D, dt_bias, A_log, D, init_states, headdim=headdim, d_state=d_state, ngroups=ngroups,
            share_bc=share_bc, dt_limit=(dt_min, dt_max), backend=backend,
        )  # fmt: skip


if not hasattr(torch.ops.hydra_vision, 'hydra_inner_scripted'):  # a second import keeps the operators of the first
    _LIBRARY = torch.library.Library('hydra_vision', 'FRAGMENT')
    for _schema, _function in zip(_SCHEMAS, (_hydra_inner, _mix_convolved)):
        _LIBRARY.define(_schema)
        _LIBRARY.impl(_schema.partition('(')[0], _function, 'CompositeImplicitAutograd')


def check_step_sizes(dt_min: float, dt_max: float) -> None:
    """Raises ValueError for an empty range of initial step sizes."""
    if not 0 < dt_min <= dt_max:
        raise ValueError(f'dt_min={dt_min}, dt_max={dt_max}; needed is 0 < dt_min <= dt_max')


def check_step_limit(dt_min: float) -> Optional[str]:
    """Why padding cannot have steps of size zero, or None."""
    return f'dt_limit has the minimum {dt_min}, and padding needs steps of size zero' if dt_min > 0 else None


def check_state_space(
    d_state: int,
    ngroups: int,
    heads: int,
    dt_min: float,
    dt_max: float,
    dt_limit: Tuple[float, float],
    backend: str,
) -> None:
    """Raises ValueError for arguments of a state space model with this many heads that do not fit."""
    check_sizes(d_state=d_state, ngroups=ngroups)
    if heads % ngroups:
        raise ValueError(f'ngroups={ngroups} does not divide the number of heads {heads}')
    check_step_sizes(dt_min, dt_max)
    if len(dt_limit) != 2 or not 0.0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(f'dt_limit={dt_limit}; it must be (min, max) with 0 <= min <= max')
    check_backend_name(backend)


@torch.no_grad()
def init_dt_bias_(dt_bias: Tensor, dt_min: float, dt_max: float, floor: float) -> None:
    """softplus(dt_bias) = dt, log-uniform in [dt_min, dt_max] and not below the floor; drawn in float32."""
    dt = torch.empty_like(dt_bias, dtype=torch.float32)
    dt.uniform_(math.log(dt_min), math.log(dt_max)).exp_().clamp_(min=floor)
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def _is_plain_product(module: nn.Module) -> bool:
    """Whether a module is y = W x and nothing sees its x and y."""
    return is_plain(module, nn.Linear) and module._parameters['bias'] is None


def _is_exporting() -> bool:
    """Under torch.export or torch.jit.trace."""
    return is_exporting() or torch.jit.is_tracing()


class Hydra(GatedMixer):
    """Bidirectional sequence mixer, (B, L, d_model) -> (B, L, d_model), linear in L.

    Args:
        d_model: Width of the tokens.
        d_state: State size N of each head.
        d_conv: Width of the depthwise non-causal convolution; odd.
        expand: ``d_inner = expand * d_model``; need not be whole.
        headdim: Head width P; divides ``d_inner``. H = d_inner / headdim.
        ngroups: Groups G of B and C; divides H.
        dt_min: Smallest step size at initialisation (log-uniform in [dt_min, dt_max]).
        dt_max: Largest step size at initialisation.
        dt_init_floor: Lower bound of the initial step size.
        dt_limit: (min, max) to which dt is clamped after softplus.
        share_bc: Both directions share B and C (Hydra-ViT-B: 90.8 M instead of 93.2 M parameters). Not in the released
            module, whose checkpoints need False.
        learnable_init_states: Learn the state (H, P, N) from which both directions start, instead of zero.
        bias: Bias of the two projections.
        conv_bias: Bias of the convolution.
        backend: As in ``quasiseparable_mix``.

    Raises:
        ValueError: A size that does not fit; an unknown ``backend``; an even ``d_conv`` (the released code silently
            changes the length).
    """

    scriptable = True
    calls_parts: Final[bool]  # of the module as TorchScript compiles it

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 7,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: Tuple[float, float] = (0.0, float('inf')),
        share_bc: bool = False,
        learnable_init_states: bool = False,
        bias: bool = False,
        conv_bias: bool = True,
        backend: str = 'auto',
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(d_model, expand=expand, headdim=headdim, d_conv=d_conv, bias=bias, conv_bias=conv_bias, **dd)
        d_inner, nheads = self.d_inner, self.nheads
        check_state_space(d_state, ngroups, nheads, dt_min, dt_max, dt_limit, backend)
        self.d_state, self.ngroups, self.share_bc, self.backend = d_state, ngroups, share_bc, backend
        self.dt_min, self.dt_max, self.dt_init_floor = dt_min, dt_max, dt_init_floor
        self.dt_limit_min, self.dt_limit_max = float(dt_limit[0]), float(dt_limit[1])
        self.calls_parts = False

        self._build_input(d_inner + (2 if share_bc else 4) * ngroups * d_state, 2 * nheads, **dd)
        self.dt_bias = nn.Parameter(torch.empty(nheads, **dd))
        self.A_log = nn.Parameter(torch.empty(nheads, **dd))
        self.D = nn.Parameter(torch.empty(nheads, **dd))
        self.fc_D = nn.Linear(d_inner, nheads, bias=False, **dd)
        self._build_output(**dd)
        if learnable_init_states:
            self.init_states = nn.Parameter(torch.empty(nheads, headdim, d_state, **dd))
        else:
            self.register_parameter('init_states', None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the parameters that this module owns itself; its submodules have a ``reset_parameters`` each."""
        nn.init.zeros_(self.A_log)
        nn.init.ones_(self.D)
        init_dt_bias_(self.dt_bias, self.dt_min, self.dt_max, self.dt_init_floor)
        if self.init_states is not None:
            nn.init.zeros_(self.init_states)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Parameters, relative to this module, that should not use weight decay."""
        return {'A_log', 'D', 'dt_bias', 'init_states'}

    @torch.jit.ignore
    def why_no_padding(self) -> Optional[str]:
        if self.init_states is not None:
            return 'learnable_init_states=True: a state that starts behind the padding is read by it'
        return check_step_limit(self.dt_limit_min)

    @torch.jit.ignore
    def why_no_packing(self) -> Optional[str]:
        if self.init_states is not None:
            return 'learnable_init_states=True: a learned state would have to start anew at every border'
        if not self._lends_weights():
            return 'conv1d, fc_D or norm was replaced, wrapped or hooked and knows no borders'
        return None

    def __prepare_scriptable__(self):
        self.calls_parts = not self._lends_weights()
        return super().__prepare_scriptable__()

    @torch.jit.unused
    def _lends_weights(self) -> bool:
        """Whether conv1d, fc_D and norm are plain, so that the fused operator computes with their weights."""
        parts = self._modules  # self.conv1d takes longer than all questions about it
        return (
            is_plain(parts['conv1d'], nn.Conv1d)
            and _is_plain_product(parts['fc_D'])
            and is_plain(parts['norm'], GatedRMSNorm)
        )

    def _call_parts(self, zxbcdt: Tensor) -> Tensor:
        """From in_proj's result to what out_proj takes, with a call of conv1d, fc_D and norm each."""
        conv_dim = self.d_inner + (2 if self.share_bc else 4) * self.ngroups * self.d_state
        z, xbc, dt = zxbcdt.split([self.d_inner, conv_dim, 2 * self.nheads], dim=-1)
        xbc = F.silu(self.conv1d(xbc.transpose(1, 2)).transpose(1, 2))
        fc_D = self.fc_D(xbc[..., : self.d_inner])
        y = _mix_convolved(
            xbc,
            dt,
            fc_D,
            self.dt_bias,
            self.A_log,
            self.D,
            self.init_states,
            self.headdim,
            self.d_state,
            self.ngroups,
            self.share_bc,
            self.dt_limit_min,
            self.dt_limit_max,
            self.backend,
        )
        return self.norm(y, z)

    @torch.jit.unused
    def _late(self, zxbcdt: Tensor, cu_seqlens: Optional[Tensor] = None) -> Tuple[Tensor, Optional[Tensor]]:
        """``forward_late`` from in_proj's result on, of parts that are plain."""
        arguments = InnerArguments(
            zxbcdt,
            self.conv1d.weight,
            self.conv1d.bias,
            self.dt_bias,
            self.A_log,
            self.D,
            self.fc_D.weight,
            self.norm.weight,
            self.init_states,
            self.headdim,
            self.d_state,
            self.ngroups,
            self.share_bc,
            (self.dt_limit_min, self.dt_limit_max),
            self.norm.eps,
        )
        y, factors = hydra_inner_late(arguments, cu_seqlens, self.backend, late=_is_plain_product(self.out_proj))
        return self.out_proj(y), factors

    @torch.jit.unused
    def forward_late(self, u: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        """``forward`` without its last step, for who has a pass over the result to come and can multiply in it.

        Returns:
            out (B, L, d_model) and None; or, where the kernels leave the norm's factor per token for after out_proj,
            out and factors (B, L), float32, by which its rows are to be multiplied. They are constants to autograd.
        """
        if not self._lends_weights():
            return self(u), None
        return self._late(self.in_proj(u))

    @torch.jit.unused
    def _forward_scaled(self, zxbcdt: Tensor, cu_seqlens: Optional[Tensor] = None) -> Tensor:
        out, factors = self._late(zxbcdt, cu_seqlens)
        return out if factors is None else scale_rows(out, factors)

    @torch.jit.unused
    def _forward_packed(self, zxbcdt: Tensor, cu_seqlens: Tensor) -> Tensor:
        check_packing(self)
        return self._forward_scaled(zxbcdt, cu_seqlens)

    def forward(self, u: Tensor, valid: Optional[Tensor] = None, cu_seqlens: Optional[Tensor] = None) -> Tensor:
        """Mix the tokens.

        Args:
            u: (B, L, d_model).
            valid: (B, L), False at padding at the end of the sequence, see ``why_no_padding``; None for no padding.
            cu_seqlens: Several sequences in one row, B = 1: their borders, as in ``quasiseparable_mix``.

        Raises:
            ValueError: ``valid``, of a mixer that cannot leave padding out; ``cu_seqlens`` that does not fit.
        """
        if not torch.jit.is_scripting():
            valid, cu_seqlens = _untraced(valid), _untraced(cu_seqlens)
        zxbcdt = self.in_proj(u) if torch.jit.is_scripting() else in_whole_columns(self.in_proj, u)
        if cu_seqlens is not None:
            return self._forward_packed(zxbcdt, cu_seqlens)
        if valid is not None:
            if not torch.jit.is_scripting():
                check_padding(self)
            zxbcdt = mask_projection(zxbcdt, valid, 2 * self.nheads)
        if torch.jit.is_scripting():
            if self.calls_parts:
                return self.out_proj(self._call_parts(zxbcdt))
            y = torch.ops.hydra_vision.hydra_inner_scripted(
                zxbcdt,
                self.conv1d.weight,
                self.conv1d.bias,
                self.dt_bias,
                self.A_log,
                self.D,
                self.fc_D.weight,
                self.norm.weight,
                self.init_states,
                self.headdim,
                self.d_state,
                self.ngroups,
                self.share_bc,
                self.dt_limit_min,
                self.dt_limit_max,
                self.norm.eps,
                self.backend,
            )
        elif not self._lends_weights():
            y = self._call_parts(zxbcdt)
        else:
            # An exported or traced graph may run where the kernels return no factors; for torch.fx zxbcdt is a proxy.
            if isinstance(zxbcdt, Tensor) and zxbcdt.is_cuda and not _is_exporting():
                return self._forward_scaled(zxbcdt)
            y = _hydra_inner(
                zxbcdt,
                self.conv1d.weight,
                self.conv1d.bias,
                self.dt_bias,
                self.A_log,
                self.D,
                self.fc_D.weight,
                self.norm.weight,
                self.init_states,
                self.headdim,
                self.d_state,
                self.ngroups,
                self.share_bc,
                self.dt_limit_min,
                self.dt_limit_max,
                self.norm.eps,
                self.backend,
            )
        return self.out_proj(y)

    @torch.jit.ignore
    def matrix(self, u: Tensor) -> Tensor:
        """The mixing matrix M (B, H, L, L) that this module applies to its convolved x, for tests and pictures.

        The diagonal holds fc_D(x) + D. What ``learnable_init_states`` adds is not a function of x and not in M.
        float32, for float64 input float64; O(L^2) memory.
        """
        _, xbc, dt = split_zxbcdt(self.in_proj(u), self.d_inner, self.nheads)
        x, dt_f, dt_b, B_f, C_f, B_b, C_b = unpack_convolved(
            F.silu(convolved(self.conv1d, xbc)),
            dt,
            self.dt_bias,
            self.headdim,
            self.d_state,
            self.ngroups,
            self.share_bc,
            (self.dt_limit_min, self.dt_limit_max),
        )
        acc = accumulation_dtype(x.dtype)
        diagonal = self.fc_D(x) + self.D.to(acc)
        return quasiseparable_matrix(dt_f, dt_b, -torch.exp(self.A_log.to(acc)), B_f, C_f, B_b, C_b, diagonal.to(acc))

    def extra_repr(self) -> str:
        return (
            f'd_state={self.d_state}, headdim={self.headdim}, nheads={self.nheads}, ngroups={self.ngroups}, '
            f'share_bc={self.share_bc}, backend={self.backend!r}'
        )
