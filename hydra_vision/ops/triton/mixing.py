"""Host side of y = M x: the kernels in order, forward and backward. No autograd here."""

from dataclasses import dataclass
from typing import Optional

import torch
import triton
from torch import Tensor

from .decay import decay_backward_kernel, decay_kernel
from .launch import launch
from .mix_heads import mix_heads_kernel
from .mix_heads_backward import bc_grads_kernel, dx_heads_kernel, scores_heads_kernel
from .plan import Plan
from .scores import scores_kernel
from .states import states_kernel

__all__ = [
    'Decays',
    'DtSource',
    'MixGrads',
    'decays',
    'decays_backward',
    'mix_backward',
    'mix_forward',
    'start_gradient',
]


@dataclass
class DtSource:
    """Where dt comes from: two (B, L, H) views with common strides, and what is applied to them."""

    dt_f: Tensor
    dt_b: Tensor
    A: Tensor
    bias: Optional[Tensor] = None
    limit: Optional[tuple[float, float]] = None
    softplus: bool = False
    a_is_log: bool = False
    segments: Optional[Tensor] = None  # (L,) int32: the sequence of each token of a packed row

    def flags(self) -> dict[str, bool]:
        """Compile-time switches of every kernel that reads dt."""
        return {'SOFTPLUS': self.softplus, 'LIMIT': self.limit is not None, 'A_IS_LOG': self.a_is_log}

    @property
    def packed(self) -> bool:
        """Whether the row holds several sequences; such rows run in tiles."""
        return self.segments is not None

    def borders(self) -> Tensor:
        """The segments, or any tensor where there are none."""
        return self.A if self.segments is None else self.segments

    def bounds(self) -> tuple[float, float]:
        """(min, max) of dt."""
        return self.limit or (0.0, 0.0)


@dataclass
class Decays:
    """(B, H, Lp) each; see decay.py."""

    lf: Tensor
    lb: Tensor
    cf: Tensor
    cb: Tensor


@dataclass
class MixGrads:
    """Sums that the decays' backward needs, and the diagonal's gradient."""

    sums: Tensor
    through: Optional[Tensor]
    ddiag: Optional[Tensor]
    dstart: Optional[Tensor]  # (B, H, 2, N, P), see start_gradient


def start_gradient(dstart: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, 2, N, P) -> the gradient of the initial states (H, P, N)."""
    return dstart.sum((0, 2)).transpose(1, 2).to(dtype).contiguous()


def _head_block(H: int) -> int:
    return min(8, max(4, triton.next_power_of_2(H)))


def decays(plan: Plan, source: DtSource) -> Decays:
    """Tile-local sums of dt after softplus and clamp."""
    lf = torch.empty(plan.B, plan.H, plan.Lp, dtype=plan.sums, device=plan.device)
    out = Decays(lf, *(torch.empty_like(lf) for _ in range(3)))
    HB = _head_block(plan.H)
    bias = source.A if source.bias is None else source.bias
    launch(decay_kernel, (plan.nT * plan.B, triton.cdiv(plan.H, HB)),
        source.dt_f, source.dt_b, bias, source.A, source.borders(), out.lf, out.lb, out.cf, out.cb,
        source.dt_f.stride(0), source.dt_f.stride(1), plan.L, plan.H, plan.Lp, *source.bounds(),
        **source.flags(), PACKED=source.packed, HB=HB, T=plan.T, num_warps=4,
    )  # fmt: skip
    return out


def decays_backward(plan: Plan, source: DtSource, g: MixGrads, ddtf: Tensor, ddtb: Tensor) -> Tensor:
    """Writes the gradients of both dt views (common strides).

    Returns:
        (2, B, nT, H) float32: shares of the gradients of A (or A_log) and of the bias, to be summed.
    """
    HB = _head_block(plan.H)
    part = torch.empty(2, plan.B, plan.nT, plan.H, dtype=torch.float32, device=plan.device)
    bias = source.A if source.bias is None else source.bias
    through = g.sums if g.through is None else g.through
    launch(decay_backward_kernel, (plan.nT * plan.B, triton.cdiv(plan.H, HB)),
        source.dt_f, source.dt_b, bias, source.A, source.borders(), g.sums, through, ddtf, ddtb, part,
        source.dt_f.stride(0), source.dt_f.stride(1), ddtf.stride(0), ddtf.stride(1),
        plan.B, plan.L, plan.H, plan.Lp, plan.nT, *source.bounds(), **source.flags(), PACKED=source.packed,
        HAS_STATE=g.through is not None, EXACT=plan.exact, HB=HB, T=plan.T, num_warps=4,
    )  # fmt: skip
    return part


def _scores(plan: Plan, bc: tuple[Tensor, ...], transposed: bool) -> Tensor:
    B_f, C_f, B_b, C_b = bc
    S = plan.tiles(plan.wide)
    launch(scores_kernel, (plan.nT * plan.G * plan.B,),
        B_f, C_f, B_b, C_b, S, B_f.stride(0), B_f.stride(1), B_f.stride(2), plan.L, plan.G, plan.nT,
        N=plan.N, T=plan.T, TRANSPOSED=transposed, PREC=plan.precision, **plan.options('scores'),
    )  # fmt: skip
    return S


def _states(plan: Plan, V_f: Tensor, V_b: Tensor, u: Tensor, d: Decays, start: Optional[Tensor]) -> Tensor:
    states = plan.states()
    launch(states_kernel, (plan.B * plan.H * 2,),
        V_f, V_b, u, d.lf, d.lb, d.cf, d.cb, d.lf if start is None else start, states, states, d.lf, d.lf,
        V_f.stride(0), V_f.stride(1), V_f.stride(2), u.stride(0), u.stride(1), u.stride(2),
        plan.L, plan.H, plan.G, plan.Lp, plan.nT, N=plan.N, P=plan.P, T=plan.T, GRAD=False,
        HAS_START=start is not None, PREC=plan.precision,
        STAGES=plan.options('states')['num_stages'], **plan.options('states'),
    )  # fmt: skip
    return states


def _state_grads(
    plan: Plan, V_f: Tensor, V_b: Tensor, dy: Tensor, d: Decays, states: Tensor, has_start: bool
) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    out = plan.states()
    through = torch.empty(plan.B, plan.H, 2, plan.nT, dtype=torch.float32, device=plan.device)
    dstart = None
    if has_start:
        dstart = torch.empty(plan.B, plan.H, 2, plan.N, plan.P, dtype=torch.float32, device=plan.device)
    launch(states_kernel, (plan.B * plan.H * 2,),
        V_f, V_b, dy, d.lf, d.lb, d.cf, d.cb, d.lf, states, out, through, through if dstart is None else dstart,
        V_f.stride(0), V_f.stride(1), V_f.stride(2), dy.stride(0), dy.stride(1), dy.stride(2),
        plan.L, plan.H, plan.G, plan.Lp, plan.nT, N=plan.N, P=plan.P, T=plan.T, GRAD=True,
        HAS_START=has_start, PREC=plan.precision, STAGES=plan.options('state_grads')['num_stages'],
        **plan.options('state_grads'),
    )  # fmt: skip
    return out, through, dstart


def _has_state(plan: Plan, start: Optional[Tensor]) -> bool:
    return plan.nT > 1 or start is not None


def _diagonal_kind(diag: Optional[Tensor]) -> int:
    return 0 if diag is None else (1 if diag.ndim == 1 else 2)


def mix_forward(
    plan: Plan, x: Tensor, bc: tuple[Tensor, ...], d: Decays, diag: Optional[Tensor], start: Optional[Tensor]
) -> Tensor:
    """y (B, L, H, P). diag: (B, H, L) or (H,) float32 or None; bc: B_f, C_f, B_b, C_b with common strides."""
    B_f, C_f, B_b, C_b = bc
    S = _scores(plan, bc, transposed=False)
    states = _states(plan, B_f, B_b, x, d, start) if _has_state(plan, start) else S
    y = torch.empty(plan.B, plan.L, plan.H, plan.P, dtype=plan.dtype, device=plan.device)
    for tiles, rows in plan.spans:
        options, heads = plan.options('mix_heads', rows), plan.heads('mix_heads', rows)
        launch(mix_heads_kernel, (tiles * (plan.H // heads) * plan.B,),
            x, S, C_f, C_b, states, d.lf, d.lb, d.cf, d.cb, d.lf if diag is None else diag, y,
            x.stride(0), x.stride(1), x.stride(2), C_f.stride(0), C_f.stride(1), C_f.stride(2),
            plan.L, plan.H, plan.G, plan.Lp, plan.nT, tiles, HG=heads, N=plan.N, P=plan.P, T=plan.T, R=rows,
            DIAGONAL=_diagonal_kind(diag), HAS_STATE=_has_state(plan, start), HAS_START=start is not None,
            PREC=plan.precision, STAGES=options['num_stages'], **options,
        )  # fmt: skip
    return y


def mix_backward(
    plan: Plan,
    x: Tensor,
    bc: tuple[Tensor, ...],
    d: Decays,
    diag: Optional[Tensor],
    start: Optional[Tensor],
    dy: Tensor,
    dx: Tensor,
    dbc: tuple[Tensor, ...],
    fc: Optional[Tensor] = None,
    ddiag: Optional[Tensor] = None,
) -> MixGrads:
    """Writes dx (B, L, H, P) and dbc = dB_f, dC_f, dB_b, dC_b (common strides). dy (B, L, H, P) is contiguous.

    With fc (H, H * P) the diagonal is fc x + D: ddiag (B, L, H) must then be given and its share goes into dx.
    """
    B_f, C_f, B_b, C_b = bc
    has_state = _has_state(plan, start)
    shape = {'P': plan.P, 'T': plan.T, 'PREC': plan.precision}
    x_strides = (x.stride(0), x.stride(1), x.stride(2))
    bc_strides = (B_f.stride(0), B_f.stride(1), B_f.stride(2))
    out_strides = (dbc[0].stride(0), dbc[0].stride(1), dbc[0].stride(2))
    dx_strides = (dx.stride(0), dx.stride(1), dx.stride(2))

    states = dstates = x
    through = dstart = None
    if has_state:
        states = _states(plan, B_f, B_b, x, d, start)
        dstates, through, dstart = _state_grads(plan, C_f, C_b, dy, d, states, start is not None)
    sums = torch.empty(plan.planes, plan.B, plan.H, plan.Lp, dtype=torch.float32, device=plan.device)
    if diag is not None and ddiag is None:
        ddiag = torch.empty(plan.B, plan.L, plan.H, dtype=torch.float32, device=plan.device)
    unused = sums
    diagonal = (unused if diag is None else diag, unused if ddiag is None else ddiag, unused if fc is None else fc)
    diagonal_flags = {
        'DIAGONAL': _diagonal_kind(diag),
        'FC': fc is not None,
        'HB': max(16, triton.next_power_of_2(plan.H)),
    }
    ST = _scores(plan, bc, transposed=True)
    for tiles, rows in plan.spans:
        options, heads = plan.options('dx_heads', rows), plan.heads('dx_heads', rows)
        launch(dx_heads_kernel, (tiles * (plan.H // heads) * plan.B,),
            x, dy, ST, B_f, B_b, dstates, d.lf, d.lb, d.cf, d.cb, *diagonal, sums, dx,
            *x_strides, *bc_strides, *dx_strides, plan.B, plan.L, plan.H, plan.G, plan.Lp, plan.nT, tiles,
            HG=heads, N=plan.N, **shape, R=rows, **diagonal_flags, HAS_STATE=has_state,
            STAGES=options['num_stages'], **options,
        )  # fmt: skip
    heads = plan.heads('scores_heads', plan.T)  # of all spans: their parts lie side by side
    parts = plan.H // plan.G // heads
    dS, dST = (torch.empty(parts, *ST.shape, dtype=plan.wide, device=plan.device) for _ in range(2))
    for tiles, rows in plan.spans:
        options = plan.options('scores_heads', rows)
        launch(scores_heads_kernel, (tiles * (plan.H // heads) * plan.B,),
            x, dy, ST, d.lf, d.lb, d.cf, d.cb, sums, dS, dST, *x_strides, plan.B, plan.L, plan.H, plan.G, plan.Lp,
            plan.nT, tiles, HG=heads, **shape, R=rows, EXACT=plan.exact, STAGES=options['num_stages'],
            **options,
        )  # fmt: skip
    dB_f, dC_f, dB_b, dC_b = dbc
    for tiles, rows in plan.spans:
        options = plan.options('bc_grads', rows)
        launch(bc_grads_kernel, (4 * tiles * plan.G * plan.B,),
            x, dy, B_f, C_f, B_b, C_b, dS, dST, states, dstates, sums, d.lf, d.lb, d.cf, d.cb, dB_f, dC_f, dB_b, dC_b,
            *x_strides, *bc_strides, *out_strides, plan.B, plan.L, plan.H, plan.G, plan.Lp, plan.nT, tiles,
            N=plan.N, **shape, R=rows, PARTS=parts, HAS_START=start is not None, HAS_STATE=has_state,
            STAGES=options['num_stages'], **options,
        )  # fmt: skip
    return MixGrads(sums, through, ddiag, dstart)
