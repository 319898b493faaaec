"""The operator through the SSD scan of the ``mamba_ssm`` package: two scans over a doubled batch, as released.

For parity tests and comparison only: it flips, concatenates and rolls, which is what this project exists to avoid.
"""

from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor

from .reference import shift_tokens

__all__ = ['CHUNK_SIZE', 'mix_by_scan', 'mix_mamba_ssm']

CHUNK_SIZE = 256  # the released module's

# x, dt, A, B, C -> y, causal: y_i = sum_{j <= i} C_i . B_j exp(A sum_{j < k <= i} dt_k) dt_j x_j
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


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
    batch = x.shape[0]
    xx, dt, B, C = (torch.cat((f, b.flip(1))) for f, b in ((x, x), (dt_f, dt_b), (B_f, B_b), (C_f, C_b)))
    y = shift_tokens(scan(xx, dt, A.float(), B, C), -1)
    y = y[:batch] + y[batch:].flip(1)
    if D is not None:
        y = y + (D.unsqueeze(-1) * x).to(y.dtype)
    return y.to(x.dtype)


@torch.compiler.disable  # its autotuned kernels cannot be traced
def _ssd_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, start: Optional[Tensor], chunk_size: int
) -> Tensor:
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
        return _ssd_scan(x, dt, A, B, C, init_states, chunk_size)

    return mix_by_scan(scan, x, dt_f, dt_b, A, B_f, C_f, B_b, C_b, D)
