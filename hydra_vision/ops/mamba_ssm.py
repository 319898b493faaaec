"""The operator through the SSD scan of the ``mamba_ssm`` package: two scans over a doubled batch, as released.

For parity tests and comparison only: it flips, concatenates and rolls, which is what this project exists to avoid.
"""

from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor

from .reference import shift_tokens

__all__ = ['CHUNK_SIZE', 'double_batch', 'join_directions', 'mix_by_scan', 'mix_mamba_ssm', 'ssd_scan']

CHUNK_SIZE = 256  # the released module's

# x, dt, A, B, C -> y, causal: y_i = sum_{j <= i} C_i . B_j exp(A sum_{j < k <= i} dt_k) dt_j x_j
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def double_batch(
    x: Tensor, dt_f: Tensor, dt_b: Tensor, A: Tensor, B_f: Tensor, C_f: Tensor, B_b: Tensor, C_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, dt, A, B, C of one causal scan: both directions stacked along the batch, the second one flipped."""
    xx, dt, B, C = (torch.cat((f, b.flip(1))) for f, b in ((x, x), (dt_f, dt_b), (B_f, B_b), (C_f, C_b)))
    return xx, dt, A.float(), B, C


def join_directions(y: Tensor) -> Tensor:
    """M x without its diagonal from the scan of a doubled batch: each half one token later, the second flipped back."""
    forward, backward = shift_tokens(y, -1).chunk(2)
    return forward + backward.flip(1)


def mix_by_scan(
    scan: Scan,
    x: Tensor,
    dt_f: Tensor,
    dt_b: Tensor,
    A: Tensor,
    B_f: Tensor,
    C_f: Tensor,
    B_b: Tensor,
    C_b: Tensor,
    D: Optional[Tensor] = None,
) -> Tensor:
    """y = M x from one call of a causal scan, both directions stacked along the batch."""
    y = join_directions(scan(*double_batch(x, dt_f, dt_b, A, B_f, C_f, B_b, C_b)))
    if D is not None:
        y = y + (D.unsqueeze(-1) * x).to(y.dtype)
    return y.to(x.dtype)


@torch.compiler.disable  # its autotuned kernels cannot be traced
def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    start: Optional[Tensor] = None,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """The causal scan of the package from the state ``start`` (H, P, N), or from zero."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    if start is not None:
        start = start.expand(x.shape[0], *start.shape).contiguous()
    return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=chunk_size, initial_states=start)


def mix_mamba_ssm(
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
    *,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """y = M x. Arguments as in ``quasiseparable_mix``; CUDA tensors only. chunk_size: tokens between two states."""

    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return ssd_scan(x, dt, A, B, C, init_states, chunk_size)

    return mix_by_scan(scan, x, dt_f, dt_b, A, B_f, C_f, B_b, C_b, D)
