"""The quasiseparable operator in linear time and memory: plain PyTorch, any device, any dtype. The CPU's default.

The sequence is cut into chunks of Q tokens. Inside a chunk both triangles of the matrix are formed at once, as one
(Q, Q) tile a head; between chunks only the (N, P) states travel, once from the left and once from the right. The two
directions differ by index offsets alone: no flip, no roll, no second copy of x.

With prefix sums P_r = sum_{k<r} A dt_k inside a chunk (P_0 = 0, r = 0..Q) every exponent of the definition in
``reference.py`` is a difference of two of them:

    tile, i > j   P_f[i] - P_f[j+1]       tile, i < j    P_b[j] - P_b[i+1]
    read  state   P_f[i] (from the left)  P_b[Q] - P_b[i+1] (from the right)
    write state   P_f[Q] - P_f[j+1]       P_b[j]

The differences are taken in float64, from terms cut off where exp is zero in the working precision: a float32 prefix
sum would lose small decays that follow large ones.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import accumulation_dtype, shift_tokens

__all__ = ['DEFAULT_CHUNK_SIZE', 'mix_chunked']

DEFAULT_CHUNK_SIZE = 64
_SCAN_WIDTH = 32  # chunks (then groups of chunks, ...) combined by one small matrix product


def mix_chunked(
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
        chunk_size: Optional[int] = None,
) -> Tensor:
    """y = M x, chunk by chunk. Arguments as in ``quasiseparable_mix``.

    Args:
        chunk_size: Q, at least 1. By default the chunks are of equal length, at most ``DEFAULT_CHUNK_SIZE``, so that
            little or nothing is padded.
    """
    batch, L, H, P = x.shape
    G, N = B_f.shape[2:]
    acc = accumulation_dtype(x.dtype)
    if chunk_size is None:
        chunks = -(-L // DEFAULT_CHUNK_SIZE)
        Q = -(-L // chunks)
    else:
        Q = chunk_size
        chunks = -(-L // Q)
    padding = chunks * Q - L

    def cut(t: Tensor) -> Tensor:
        """(B, L, ...) -> (B, chunks, Q, ...). Padded tokens have dt = 0 and B = 0: they neither write nor decay."""
        if padding:
            t = F.pad(t, (0, 0) * (t.ndim - 2) + (0, padding))
        return t.unflatten(1, (chunks, Q))

    xa = x.to(acc)
    xc = cut(xa)  # (B, c, Q, H, P)
    B_fc, B_bc = (cut(t.to(acc)).transpose(2, 3) for t in (B_f, B_b))  # (B, c, G, Q, N)
    C_fc = cut(shift_tokens(C_f.to(acc), -1)).transpose(2, 3)  # row i holds C_f[i-1]
    C_bc = cut(shift_tokens(C_b.to(acc), +1)).transpose(2, 3)  # row i holds C_b[i+1]
    dt_fc, dt_bc = cut(dt_f.to(acc)), cut(dt_b.to(acc))  # (B, c, Q, H)
    P_f, P_b = (_prefix_sums(A, dt, acc) for dt in (dt_fc, dt_bc))  # (B, c, H, Q+1), float64

    # Inside the chunks: both triangles in one tile, (B, c, H, Q, Q).
    i = torch.arange(Q, device=x.device)
    lower, diagonal = i[:, None] > i[None, :], i[:, None] == i[None, :]
    exponent = torch.where(
        lower,
        P_f[..., :-1, None] - P_f[..., None, 1:],
        P_b[..., None, :-1] - P_b[..., 1:, None],
    ).to(acc)
    # The two masks in one step: the diagonal belongs to D, and above it the exponent is <= 0 as it is below.
    tile = exponent.masked_fill(diagonal, 0.0).exp().unflatten(2, (G, H // G))  # (B, c, G, H/G, Q, Q)
    scores = torch.where(lower, C_fc @ B_fc.mT, C_bc @ B_bc.mT).masked_fill(diagonal, 0.0)  # (B, c, G, Q, Q)
    dt_column = torch.where(lower, *(dt.transpose(2, 3).unsqueeze(-2) for dt in (dt_fc, dt_bc)))  # (B, c, H, Q, Q)
    tile = (tile * scores.unsqueeze(3)).flatten(2, 3) * dt_column
    y = (tile @ xc.transpose(2, 3)).transpose(2, 3)  # (B, c, Q, H, P)

    # Between the chunks. A single chunk without a start state has no neighbour to hear from.
    if chunks > 1 or init_states is not None:
        write_f = (P_f[..., -1:] - P_f[..., 1:]).to(acc).exp().transpose(2, 3) * dt_fc  # (B, c, Q, H)
        write_b = P_b[..., :-1].to(acc).exp().transpose(2, 3) * dt_bc
        states_f = _outer_states(B_fc, xc, write_f)  # (B, c, G, N, H/G * P)
        states_b = _outer_states(B_bc, xc, write_b)
        start = None
        if init_states is not None:  # (H, P, N) -> (G, N, H/G * P)
            start = init_states.to(acc).permute(2, 0, 1).unflatten(1, (G, H // G)).permute(1, 0, 2, 3).flatten(2)
        entering_f = _scan(states_f, P_f[..., -1], start, from_left=True)
        entering_b = _scan(states_b, P_b[..., -1], start, from_left=False)
        read_f = P_f[..., :-1].to(acc).exp().transpose(2, 3)  # (B, c, Q, H)
        read_b = (P_b[..., -1:] - P_b[..., 1:]).to(acc).exp().transpose(2, 3)
        y = y + _read_states(C_fc, entering_f, read_f, P) + _read_states(C_bc, entering_b, read_b, P)

    y = y.flatten(1, 2)
    if padding:
        y = y[:, :L]
    if D is not None:
        y = y + D.to(acc).unsqueeze(-1) * xa
    return y.to(x.dtype)


def _prefix_sums(A: Tensor, dt: Tensor, acc: torch.dtype) -> Tensor:
    """sum_{k<r} A dt_k for r = 0..Q. dt (B, c, Q, H) -> (B, c, H, Q+1), in float64 where the device has it.

    A term is cut off at the point where exp of it alone is zero in ``acc``: every sum that holds it stays zero after
    exp, and the prefix sums stay small enough for their differences to be exact to the last bits that matter.
    """
    dtype = torch.float32 if dt.device.type == 'mps' else torch.float64
    floor = -760.0 if acc == torch.float64 else -110.0
    terms = (A.to(dtype) * dt.to(dtype)).clamp(min=floor)
    return F.pad(terms.cumsum(2), (0, 0, 1, 0)).transpose(2, 3)


def _outer_states(B: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """What each chunk adds to the state: sum_j weight_j B_j x_j^T.

    B (B, c, G, Q, N), x (B, c, Q, H, P), weight (B, c, Q, H) -> (B, c, G, N, H/G * P).
    """
    weighted = (x * weight.unsqueeze(-1)).unflatten(3, (B.shape[2], -1)).flatten(4)  # (B, c, Q, G, H/G * P)
    return B.mT @ weighted.transpose(2, 3)


def _read_states(C: Tensor, states: Tensor, weight: Tensor, P: int) -> Tensor:
    """C (B, c, G, Q, N), states (B, c, G, N, H/G * P), weight (B, c, Q, H) -> (B, c, Q, H, P)."""
    read = (C @ states).transpose(2, 3).flatten(3).unflatten(3, (-1, P))
    return read * weight.unsqueeze(-1)


def _scan(states: Tensor, log_decay: Tensor, start: Optional[Tensor], from_left: bool) -> Tensor:
    """The state that enters each chunk: what the chunks before it (after it, from the right) have left there.

    from_left:   E[c] = exp(log_decay[c-1]) E[c-1] + states[c-1],  E[0] = start
    from right:  E[c] = exp(log_decay[c+1]) E[c+1] + states[c+1],  E[last] = start

    Up to ``_SCAN_WIDTH`` chunks are combined by one triangular matrix product; more are cut into groups of that many,
    and the groups' totals go through the same function: O(chunks) work, O(log chunks) depth.

    Args:
        states: (B, c, G, N, H/G * P).
        log_decay: (B, c, H), float64, <= 0.
        start: (G, N, H/G * P) or None for zero.
    Returns:
        E (B, c, G, N, H/G * P).
    """
    batch, chunks, G, N, width = states.shape
    H = log_decay.shape[-1]
    if chunks > _SCAN_WIDTH:
        groups = -(-chunks // _SCAN_WIDTH)
        padding = groups * _SCAN_WIDTH - chunks
        grouped = F.pad(states, (0, 0) * 3 + (0, padding)).reshape(batch * groups, _SCAN_WIDTH, G, N, width)
        decay = F.pad(log_decay, (0, 0, 0, padding)).reshape(batch * groups, _SCAN_WIDTH, H)
        inside = _scan(grouped, decay, None, from_left).unflatten(0, (batch, groups))
        decay = decay.unflatten(0, (batch, groups))  # (B, groups, width, H)
        last, first = (-1, 0) if from_left else (0, -1)
        final = _decay_states(decay[:, :, last], inside[:, :, last]) + grouped.unflatten(0, (batch, groups))[:, :, last]
        entering = _scan(final, decay.sum(2), start, from_left)  # (B, groups, G, N, width)
        # from the group's edge to the chunk's edge: the sum of the decays between them, the chunk's own left out
        between = decay.cumsum(2) - decay if from_left else decay.flip(2).cumsum(2).flip(2) - decay
        inside = inside + _decay_states(between, entering.unsqueeze(2))
        return inside.flatten(1, 2)[:, :chunks]

    sums = F.pad(log_decay.cumsum(1), (0, 0, 1, 0)).transpose(1, 2)  # (B, H, c+1)
    i = torch.arange(chunks, device=states.device)
    if from_left:
        mask = i[:, None] > i[None, :]
        exponent = sums[..., :-1, None] - sums[..., None, 1:]  # sum over [j+1, i)
        edge = sums[..., :-1]  # sum over [0, i)
    else:
        mask = i[:, None] < i[None, :]
        exponent = sums[..., None, :-1] - sums[..., 1:, None]  # sum over [i+1, j)
        edge = sums[..., -1:] - sums[..., 1:]  # sum over [i+1, c)
    weight = exponent.masked_fill(~mask, 0.0).to(states.dtype).exp() * mask  # (B, H, c, c)
    flat = states.unflatten(-1, (H // G, -1)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(3)  # (B, H, c, N * P)
    entering = weight @ flat
    if start is not None:
        start = start.unflatten(-1, (H // G, -1)).permute(0, 2, 1, 3).flatten(0, 1).flatten(1)  # (H, N * P)
        entering = entering + edge.to(states.dtype).exp().unsqueeze(-1) * start.unsqueeze(1)
    entering = entering.unflatten(-1, (N, -1)).unflatten(1, (G, H // G))  # (B, G, H/G, c, N, P)
    return entering.permute(0, 3, 1, 4, 2, 5).flatten(4)


def _decay_states(log_decay: Tensor, states: Tensor) -> Tensor:
    """exp(log_decay) * states a head. log_decay (..., H), states (..., G, N, H/G * P)."""
    G = states.shape[-3]
    decay = log_decay.to(states.dtype).exp().unflatten(-1, (G, -1)).unsqueeze(-2).unsqueeze(-1)  # (..., G, 1, H/G, 1)
    return (states.unflatten(-1, (decay.shape[-2], -1)) * decay).flatten(-2)
