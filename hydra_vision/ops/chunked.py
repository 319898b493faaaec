"""The quasiseparable operator in linear time and memory: plain PyTorch, any device, any dtype. The CPU's default.

The sequence is cut into chunks of Q tokens, a chunk into Q / q tiles. Three kinds of work, from near to far:

* inside a tile of q tokens, both triangles of the matrix are formed at once, as one (q, q) block a head;
* between tiles of one chunk, a rectangle of the matrix that does not touch the diagonal is a score matrix shared by
  the heads of a group, with one factor a row and one a column: a wide product, no exponential an entry. Neighbours are
  joined in pairs, then pairs of pairs: 2 q, 4 q, ... Q;
* between chunks only the (N, P) states travel, once from the left and once from the right.

The two directions differ by index offsets alone: no flip, no roll, no second copy of x.

With prefix sums P_r = sum_{k<r} A dt_k inside a chunk (P_0 = 0, r = 0..Q) every exponent of the definition in
``reference.py`` is a difference of two of them, and never positive:

    tile, i > j       P_f[i] - P_f[j+1]                      tile, i < j    P_b[j] - P_b[i+1]
    column before m   P_f[m] - P_f[j+1]  (m: the boundary)   column after m P_b[j] - P_b[m]
    row after m       P_f[i] - P_f[m]                        row before m   P_b[m] - P_b[i+1]

The differences are taken in float64, from terms cut off where exp is zero in the working precision: a float32 prefix
sum would lose small decays that follow large ones.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import accumulation_dtype, add, scale, shift_tokens

__all__ = ['mix_chunked']

_SINGLE_CHUNK = 256  # a sequence up to this long is one chunk: pairs of tiles cost less there than states
_CHUNK = 128  # Q, at most, of longer sequences
_TILE = 32  # q, at most
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
    tile_size: int = _TILE,
) -> Tensor:
    """y = M x, chunk by chunk. Arguments as in ``quasiseparable_mix``.

    Args:
        chunk_size: Most tokens between two states, at least 1; by default 128, and a single chunk up to L = 256. Chunks
            and tiles are made equally long, so that little or nothing is padded.
        tile_size: Most tokens in a tile, at least 1.
    """
    batch, L, H, P = x.shape
    G = B_f.shape[2]
    acc = accumulation_dtype(x.dtype)
    if chunk_size is None:
        chunk_size = _SINGLE_CHUNK if L <= _SINGLE_CHUNK else _CHUNK
    chunks = -(-L // chunk_size)
    levels = 0  # a chunk is 2 ** levels tiles
    while -(-L // (chunks << levels)) > tile_size:
        levels += 1
    q = -(-L // (chunks << levels))
    Q = q << levels
    padding = chunks * Q - L

    def cut(t: Tensor) -> Tensor:
        """(B, L, ...) -> (B * c, Q, ...). Padded tokens have dt = 0: they neither write nor decay."""
        if padding:
            t = F.pad(t, (0, 0) * (t.ndim - 2) + (0, padding))
        return t.unflatten(1, (chunks, Q)).flatten(0, 1)

    xa = x.to(acc)
    xc = cut(xa)  # (Bc, Q, H, P)
    B_f, B_b = (cut(t.to(acc)).transpose(1, 2) for t in (B_f, B_b))  # (Bc, G, Q, N)
    C_f = cut(shift_tokens(C_f.to(acc), -1)).transpose(1, 2)  # row i holds C_f[i-1]
    C_b = cut(shift_tokens(C_b.to(acc), +1)).transpose(1, 2)  # row i holds C_b[i+1]
    dt_f, dt_b = cut(dt_f.to(acc)), cut(dt_b.to(acc))  # (Bc, Q, H)
    P_f, P_b = (_prefix_sums(A, dt, acc) for dt in (dt_f, dt_b))  # (Bc, Q+1, H), float64

    diagonal = None if D is None else cut(D.to(acc).expand(batch, L, H))
    y = _mix_tiles(xc, dt_f, dt_b, P_f, P_b, B_f, C_f, B_b, C_b, diagonal, q)
    span = q
    while span < Q:
        _mix_neighbours_(y, xc, dt_f, dt_b, P_f, P_b, B_f, C_f, B_b, C_b, span)
        span *= 2
    # A single chunk without a start state has no neighbour to hear from.
    if chunks > 1 or init_states is not None:
        start = None
        if init_states is not None:  # (H, P, N) -> (G, N, H/G * P)
            start = init_states.to(acc).permute(2, 0, 1).unflatten(1, (G, H // G)).permute(1, 0, 2, 3).flatten(2)
        for dt, sums, Bt, Ct, from_left in ((dt_f, P_f, B_f, C_f, True), (dt_b, P_b, B_b, C_b, False)):
            total = sums[:, -1:]
            read = sums[:, :-1] if from_left else total - sums[:, 1:]
            write = total - sums[:, 1:] if from_left else sums[:, :-1]
            weighted = xc * (write.to(acc).exp() * dt).unsqueeze(-1)
            states = Bt.transpose(-1, -2) @ _by_group(weighted, G)  # (Bc, G, N, H/G * P)
            entering = _scan(
                states.unflatten(0, (batch, chunks)), total[:, 0].unflatten(0, (batch, chunks)), start, from_left
            ).flatten(0, 1)
            y = add(y, scale(_by_token(Ct @ entering, P), read.to(acc).exp().unsqueeze(-1)))

    y = y.unflatten(0, (batch, chunks)).flatten(1, 2)
    if padding:
        y = y[:, :L]
    return y.to(x.dtype)


def _prefix_sums(A: Tensor, dt: Tensor, acc: torch.dtype) -> Tensor:
    """sum_{k<r} A dt_k for r = 0..Q. dt (Bc, Q, H) -> (Bc, Q+1, H), in float64 where the device has it.

    A term is cut off at the point where exp of it alone is zero in ``acc``: every sum that holds it stays zero after
    exp, and the prefix sums stay small enough for their differences to be exact to the last bits that matter.
    """
    dtype = torch.float32 if dt.device.type == 'mps' else torch.float64
    floor = -760.0 if acc == torch.float64 else -110.0
    terms = (A.to(dtype) * dt.to(dtype)).clamp(min=floor)
    return F.pad(terms.cumsum(1), (0, 0, 1, 0))


def _by_group(t: Tensor, G: int) -> Tensor:
    """(Bc, Q, H, P) -> (Bc, G, Q, H/G * P)."""
    return t.unflatten(2, (G, t.shape[2] // G)).flatten(3).transpose(1, 2)


def _by_token(t: Tensor, P: int) -> Tensor:
    """(Bc, G, Q, H/G * P) -> (Bc, Q, H, P)."""
    return t.unflatten(3, (t.shape[3] // P, P)).transpose(1, 2).flatten(2, 3)


def _mix_tiles(
    x: Tensor,
    dt_f: Tensor,
    dt_b: Tensor,
    P_f: Tensor,
    P_b: Tensor,
    B_f: Tensor,
    C_f: Tensor,
    B_b: Tensor,
    C_b: Tensor,
    D: Optional[Tensor],
    q: int,
) -> Tensor:
    """The blocks on the diagonal, both triangles and D (Bc, Q, H) between them. Returns (Bc, Q, H, P)."""
    Bc, Q, H, P = x.shape
    G = B_f.shape[1]
    shape = (Q // q, q)

    def per_head(t: Tensor) -> Tensor:
        """(Bc, Q, H, ...) -> (Bc, tiles, H, q, ...), contiguous: what is computed from it takes over its layout."""
        return t.unflatten(1, shape).transpose(2, 3).contiguous()

    def per_group(t: Tensor) -> Tensor:
        """(Bc, G, Q, N) -> (Bc, tiles, G, q, N)."""
        return t.unflatten(2, shape).transpose(1, 2)

    i = torch.arange(q, device=x.device)
    lower = i[:, None] > i[None, :]
    scores = torch.where(
        lower, per_group(C_f) @ per_group(B_f).transpose(-1, -2), per_group(C_b) @ per_group(B_b).transpose(-1, -2)
    )
    before_f, after_f, before_b, after_b = (per_head(t) for t in (P_f[:, :-1], P_f[:, 1:], P_b[:, :-1], P_b[:, 1:]))
    tile = torch.where(
        lower,
        before_f.unsqueeze(-1) - after_f.unsqueeze(-2),
        before_b.unsqueeze(-2) - after_b.unsqueeze(-1),
    ).to(x.dtype)  # (Bc, tiles, H, q, q)
    tile.diagonal(dim1=-2, dim2=-1).zero_()  # positive there, and exp might overflow
    tile = scale(tile.exp_().unflatten(2, (G, H // G)), scores.unsqueeze(3)).flatten(2, 3)
    tile = scale(tile, torch.where(lower, per_head(dt_f).unsqueeze(-2), per_head(dt_b).unsqueeze(-2)))
    if D is None:
        tile.diagonal(dim1=-2, dim2=-1).zero_()
    else:
        diagonal = per_head(D)  # (Bc, tiles, H, q)
        try:
            tile.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
        except RuntimeError:  # in torch.func.vmap, where the mapped dimension may be the diagonal's alone
            tile = torch.diagonal_scatter(tile, diagonal, dim1=-2, dim2=-1)
    y = tile @ per_head(x)  # (Bc, tiles, H, q, P)
    return y.transpose(2, 3).reshape(Bc, Q, H, P)


def _mix_neighbours_(
    y: Tensor,
    x: Tensor,
    dt_f: Tensor,
    dt_b: Tensor,
    P_f: Tensor,
    P_b: Tensor,
    B_f: Tensor,
    C_f: Tensor,
    B_b: Tensor,
    C_b: Tensor,
    span: int,
) -> None:
    """Adds to y what two neighbouring spans of tokens tell each other: the blocks beside the diagonal of 2 * span."""
    G, P = B_f.shape[1], x.shape[-1]
    pair = (x.shape[1] // (2 * span), 2, span)

    def halves(t: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
        """Views of the left and the right span of every pair, (Bc, pairs, span, ...)."""
        pairs = t.unflatten(dim, pair)
        return pairs.select(dim + 1, 0).transpose(1, dim), pairs.select(dim + 1, 1).transpose(1, dim)

    def send(x: Tensor, column: Tensor, Bt: Tensor, Ct: Tensor) -> Tensor:
        """(Bc, pairs, span, H, P) of one side -> what the other side reads, before the factor of its rows."""
        weighted = (x * column.unsqueeze(-1)).flatten(0, 1)
        scores = Ct @ Bt.transpose(-1, -2)  # (Bc, pairs, G, span, span)
        return _by_token(scores.flatten(0, 1) @ _by_group(weighted, G), P).view_as(x)

    y_left, y_right = halves(y)
    x_left, x_right = halves(x)
    before_f, after_f = halves(P_f[:, :-1])[1], halves(P_f[:, 1:])[0]
    before_b, after_b = halves(P_b[:, :-1])[1], halves(P_b[:, 1:])[0]
    middle_f, middle_b = after_f[:, :, -1:], after_b[:, :, -1:]
    column = (middle_f - after_f).to(x.dtype).exp() * halves(dt_f)[0]  # (Bc, pairs, span, H)
    row = (before_f - middle_f).to(x.dtype).exp()
    y_right.add_(scale(send(x_left, column, halves(B_f, 2)[0], halves(C_f, 2)[1]), row.unsqueeze(-1)))
    column = (before_b - middle_b).to(x.dtype).exp() * halves(dt_b)[1]
    row = (middle_b - after_b).to(x.dtype).exp()
    y_left.add_(scale(send(x_right, column, halves(B_b, 2)[1], halves(C_b, 2)[0]), row.unsqueeze(-1)))


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
        last = -1 if from_left else 0
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
    flat = (
        states.unflatten(-1, (H // G, width * G // H)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(3)
    )  # (B, H, c, N * P)
    entering = weight @ flat
    if start is not None:
        start = start.unflatten(-1, (H // G, width * G // H)).permute(0, 2, 1, 3).flatten(0, 1).flatten(1)  # (H, N * P)
        entering = entering + edge.to(states.dtype).exp().unsqueeze(-1) * start.unsqueeze(1)
    entering = entering.unflatten(-1, (N, width * G // H)).unflatten(1, (G, H // G))  # (B, G, H/G, c, N, P)
    return entering.permute(0, 3, 1, 4, 2, 5).flatten(4)


def _decay_states(log_decay: Tensor, states: Tensor) -> Tensor:
    """exp(log_decay) * states a head. log_decay (..., H), states (..., G, N, H/G * P)."""
    G, H = states.shape[-3], log_decay.shape[-1]
    heads = (H // G, states.shape[-1] * G // H)
    decay = log_decay.to(states.dtype).exp().unflatten(-1, (G, H // G)).unsqueeze(-2).unsqueeze(-1)
    return (states.unflatten(-1, heads) * decay).flatten(-2)  # (..., G, N, H/G, P) * (..., G, 1, H/G, 1)
