"""Several sequences one after the other in one row: borders that no state and no convolution crosses.

What a direction carries over a border goes through the token before it (in its order): the last of a sequence for the
forward direction, the first for the backward one. Nobody of its own sequence reads what that token writes, so it may
write nothing and forget everything, and every other token is as it was.
"""

from itertools import pairwise
from typing import Optional

import torch
from torch import Tensor

__all__ = ['check_cu_seqlens', 'segments_of', 'separated', 'set_apart']


def check_cu_seqlens(cu_seqlens: Tensor, like: Tensor, init_states: Optional[Tensor]) -> None:
    """Raises for borders that do not fit ``like`` (1, L, ...). Values are read on the CPU only.

    Raises:
        ValueError: A shape, device or value that does not fit, a batch, or a start state.
        TypeError: Not int32 or int64.
    """
    B, L = like.shape[:2]
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f'cu_seqlens has dtype {cu_seqlens.dtype}; allowed: torch.int32, torch.int64')
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f'cu_seqlens has shape {tuple(cu_seqlens.shape)}; it must be (sequences + 1,)')
    if B != 1:
        raise ValueError(f'cu_seqlens needs all sequences in one row, B = 1; the batch is {B}')
    if cu_seqlens.device != like.device:
        raise ValueError(f'cu_seqlens is on device {cu_seqlens.device}; it must be on {like.device}')
    if init_states is not None:
        raise ValueError('cu_seqlens: init_states would have to start anew at every border; leave them out')
    if cu_seqlens.device.type == 'cpu' and not torch.compiler.is_compiling():
        borders = cu_seqlens.tolist()
        if borders[0] != 0 or borders[-1] != L or any(a >= b for a, b in pairwise(borders)):
            raise ValueError(f'cu_seqlens = {borders}; it must rise from 0 to L = {L}')


def segments_of(cu_seqlens: Tensor, L: int) -> Tensor:
    """(L,) int32, the number of the sequence of each token."""
    tokens = torch.arange(L, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True, out_int32=True)


def separated(
    segments: Tensor, dt_f: Tensor, dt_b: Tensor, A: Tensor, B_f: Tensor, B_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dt_f, dt_b (float32 or wider), B_f and B_b with which the operator has borders between the sequences."""
    wide = torch.promote_types(dt_f.dtype, torch.float32)
    border = segments[1:] != segments[:-1]
    never = border.new_zeros(1)
    # a decay of exp(-150) is zero, and no number beside others in a sum; exp(-800) is what float64 needs
    forget = (800.0 if wide == torch.float64 else 150.0) / A.detach().to(wide).abs()
    out = []
    for dt, B, at in ((dt_f, B_f, torch.cat([border, never])), (dt_b, B_b, torch.cat([never, border]))):
        out.append((torch.where(at[:, None], forget, dt.to(wide)), B.masked_fill(at[:, None, None], 0.0)))
    (dt_f, B_f), (dt_b, B_b) = out
    return dt_f, dt_b, B_f, B_b


def set_apart(x: Tensor, cu_seqlens: Tensor, gap: int) -> tuple[Tensor, Tensor]:
    """x (1, L, C) with ``gap`` rows of zeros between the sequences, and where each of the L tokens stands in it."""
    L, sequences = x.shape[1], cu_seqlens.shape[0] - 1
    place = torch.arange(L, device=x.device) + segments_of(cu_seqlens, L) * gap
    return x.new_zeros(1, L + (sequences - 1) * gap, x.shape[2]).index_copy(1, place, x), place
