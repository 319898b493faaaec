"""The operator through the SSD scan of the ``mamba_ssm`` package: two scans over a doubled batch, as released.

For parity tests and comparison only: it flips, concatenates and rolls, which is what this project exists to avoid.
"""

from typing import Optional

import torch
from torch import Tensor

from .reference import shift_tokens

__all__ = ['mix_mamba_ssm']

CHUNK_SIZE = 256  # the released module's


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
) -> Tensor:
    """y = M x. Arguments as in ``quasiseparable_mix``; CUDA tensors only."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    batch = x.shape[0]
    forward_then_backward = (torch.cat((f, b.flip(1))) for f, b in ((x, x), (dt_f, dt_b), (B_f, B_b), (C_f, C_b)))
    xx, dt, B, C = forward_then_backward
    start = None if init_states is None else init_states.expand(2 * batch, *init_states.shape).contiguous()
    y = mamba_chunk_scan_combined(xx, dt, A.float(), B, C, chunk_size=CHUNK_SIZE, initial_states=start)
    y = shift_tokens(y, -1)
    y = y[:batch] + y[batch:].flip(1)
    if D is not None:
        y = y + (D.unsqueeze(-1) * x).to(y.dtype)
    return y.to(x.dtype)
