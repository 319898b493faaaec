"""Entry points: autograd.Function in eager mode, torch.library ops under torch.compile and torch.export."""

from typing import Optional

import torch
from torch import Tensor

from ..arguments import InnerArguments
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


def hydra_inner(a: InnerArguments, late: bool = False) -> tuple[Tensor, Optional[Tensor]]:
    """(B, L, d_inner), ready for out_proj, and None.

    late: the norm's factors may come apart, (B, L) float32, for the rows of out_proj's result; as ``scale_rows`` does.
    """
    *front, (low, high), eps, segments = a
    limit = (float(low), float(high))
    refuse_transforms()
    if torch.compiler.is_compiling():
        out, factors, *_ = hydra_inner_op(*front, *limit, eps, late, segments)
    else:
        out, factors = HydraInner.apply(late, *front, limit, eps, segments)
    return out, factors if factors.ndim == 2 else None


def scale_rows(x: Tensor, factors: Tensor) -> Tensor:
    """x (B, L, D) with its rows multiplied by factors (B, L) float32, which have no gradient; in x's dtype."""
    if torch.compiler.is_compiling():
        return (x * factors.unsqueeze(-1)).to(x.dtype)
    return ScaleRows.apply(x, factors)
