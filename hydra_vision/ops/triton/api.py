"""Entry points: autograd.Function in eager mode, torch.library ops under torch.compile and torch.export."""

from typing import Optional

import torch
from torch import Tensor

from .function import HydraInner, QuasiseparableMix, ScaleRows, refuse_transforms
from .library import hydra_inner_op, quasiseparable_mix_op

__all__ = ['hydra_inner', 'quasiseparable_mix', 'scale_rows']


def quasiseparable_mix(
    x: Tensor,
    dt_f: Tensor,
    dt_b: Tensor,
    A: Tensor,
    B_f: Tensor,
    C_f: Tensor,
    B_b: Tensor,
    C_b: Tensor,
    D: Optional[Tensor] = None,
    init_states: Optional[Tensor] = None,
) -> Tensor:
    """y (B, L, H, P) = M x. Arguments as in ``hydra_vision.ops.quasiseparable_mix``."""
    refuse_transforms()
    if torch.compiler.is_compiling():
        return quasiseparable_mix_op(x, dt_f, dt_b, A, B_f, C_f, B_b, C_b, D, init_states)
    return QuasiseparableMix.apply(x, dt_f, dt_b, A, B_f, C_f, B_b, C_b, D, init_states)


def hydra_inner(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Optional[Tensor],
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    fc_D_weight: Tensor,
    norm_weight: Tensor,
    *,
    headdim: int,
    d_state: int,
    ngroups: int,
    share_bc: bool,
    dt_limit: tuple[float, float],
    init_states: Optional[Tensor],
    segments: Optional[Tensor] = None,
    eps: float,
    late: bool = False,
) -> tuple[Tensor, Optional[Tensor]]:
    """(B, L, d_inner), ready for out_proj, and None. Arguments as in ``hydra_vision.ops.hydra_inner``.

    segments: (L,) int32, the sequence of each token of a packed row.
    late: the norm's factors may come apart, (B, L) float32, for the rows of out_proj's result; as ``scale_rows`` does.
    """
    low, high = float(dt_limit[0]), float(dt_limit[1])
    refuse_transforms()
    if torch.compiler.is_compiling():
        out, factors, *_ = hydra_inner_op(
            zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, fc_D_weight, norm_weight, init_states,
            headdim, d_state, ngroups, share_bc, low, high, eps, late, segments,
        )  # fmt: skip
    else:
        out, factors = HydraInner.apply(
            late, zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, fc_D_weight, norm_weight, init_states,
            headdim, d_state, ngroups, share_bc, (low, high), eps, segments,
        )  # fmt: skip
    return out, factors if factors.ndim == 2 else None


def scale_rows(x: Tensor, factors: Tensor) -> Tensor:
    """x (B, L, D) with its rows multiplied by factors (B, L) float32, which have no gradient; in x's dtype."""
    if torch.compiler.is_compiling():
        return (x * factors.unsqueeze(-1)).to(x.dtype)
    return ScaleRows.apply(x, factors)
