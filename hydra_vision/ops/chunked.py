"""The quasiseparable operator in linear time and memory: plain PyTorch, any device, any dtype. The CPU's default.

The sequence is cut into chunks of Q tokens, a chunk into n tiles of q. Inside a chunk the matrix is formed, in two
passes over its entries: the decays, as products of a row's and a column's factor, and the scores C B^T, which the heads
of a group share. On the CPU that is done for a few chunks at a time, in buffers that stay in the cache, and again in
the backward pass: nothing of the size Q^2 is kept. Exponentials are taken of tables only:

* a tile of q rows and a column outside it: the decay from the column to the tile's edge, and from there to the row.
  Both directions are the two terms of one product of inner size 2, of which one is zero;
* in the (q, q) tiles on the diagonal: of each entry, for both triangles at once.

Between chunks only the (N, P) states travel, once from the left and once from the right. The two directions differ by
index offsets alone: no flip, no roll.

With prefix sums P_r = sum_{k<r} A dt_k inside a chunk (P_0 = 0, r = 0..Q) every exponent of the definition in
``reference.py`` is a difference of two of them, and never positive:

    tile, i > j          P_f[i] - P_f[j+1]                     tile, i < j         P_b[j] - P_b[i+1]
    column left of m     P_f[m] - P_f[j+1]  (m: tile's edge)   column right of m   P_b[j] - P_b[m]
    row right of m       P_f[i] - P_f[m]                       row left of m       P_b[m] - P_b[i+1]

The differences are taken in float64, from terms cut off where exp is zero in the working precision: a float32 prefix
sum would lose small decays that follow large ones.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .reference import accumulation_dtype, add, scale

__all__ = ['mix_chunked']

_SINGLE_CHUNK = 256  # a sequence up to this long is one chunk: its matrix costs less there than states
_CHUNK = 128  # Q, at most, of longer sequences
_TILE = 32  # q, at most
_SLICE = 2**19  # entries of the matrices that are formed at a time
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
        chunk_size: Most tokens between two states, at least 1; by default 128, and a single chunk up to L = 256.
        tile_size: Most tokens in a tile, at least 1. Chunks and tiles are made equally long, so that little or nothing
            is padded.
    """
    batch, L, H, P = x.shape
    G = B_f.shape[2]
    acc = accumulation_dtype(x.dtype)
    if chunk_size is None:
        chunk_size = _SINGLE_CHUNK if L <= _SINGLE_CHUNK else _CHUNK
    chunks = -(-L // chunk_size)
    # the tile size of the shortest chunk, of these the largest
    q = min(range(tile_size, tile_size // 2, -1), key=lambda q: -(-L // (chunks * q)) * q)
    n = -(-L // (chunks * q))
    Q = n * q
    padding = chunks * Q - L

    def cut(t: Tensor, shift: int = 0) -> Tensor:
        """(B, L, ...) -> (B * c, Q, ...). Row i holds row i - shift; what lies outside is zero.

        Padded tokens have dt = 0: they neither write nor decay.
        """
        if padding or shift:
            t = F.pad(t, (0, 0) * (t.ndim - 2) + (shift, padding - shift))
        return t.reshape(batch * chunks, Q, *t.shape[2:])

    xc = cut(x.to(acc))  # (Bc, Q, H, P)
    Bs = [cut(t.to(acc)).transpose(1, 2) for t in (B_f, B_b)]  # (Bc, G, Q, N), a direction each
    Cs = [cut(t.to(acc), shift).transpose(1, 2) for t, shift in ((C_f, 1), (C_b, -1))]  # C_f[i-1], C_b[i+1]
    dt = torch.stack([cut(dt_f.to(acc)), cut(dt_b.to(acc))], 2)  # (Bc, Q, 2, H)
    sums = _prefix_sums(A, dt, acc).permute(0, 2, 3, 1).contiguous()  # (Bc, 2, H, Q+1), float64
    dt = dt.permute(0, 2, 3, 1).contiguous()

    D = xc.new_zeros(()) if D is None else D.to(acc)
    diagonal = cut(D.expand(batch, L, H)).transpose(1, 2)
    y = _mix_inside(*_decays(dt, sums, diagonal, n), *Bs, *Cs, xc)  # (Bc, Q, H, P)
    # A single chunk without a start state has no neighbour to hear from.
    if chunks > 1 or init_states is not None:
        start = None
        if init_states is not None:  # (H, P, N) -> (G, N, H/G * P)
            start = init_states.to(acc).permute(2, 0, 1).unflatten(1, (G, H // G)).permute(1, 0, 2, 3).flatten(2)
        before, total = sums[..., :-1], sums[..., -1:]
        after = total - sums[..., 1:]
        for d, (read, write) in enumerate(((before[:, 0], after[:, 0]), (after[:, 1], before[:, 1]))):
            write = (write.to(acc).exp() * dt[:, d]).transpose(1, 2)
            states = Bs[d].transpose(-1, -2) @ _by_group(xc * write.unsqueeze(-1), G)  # (Bc, G, N, H/G * P)
            entering = _scan(
                states.unflatten(0, (batch, chunks)), total[:, d, :, 0].unflatten(0, (batch, chunks)), start, d == 0
            ).flatten(0, 1)
            read = read.to(acc).exp().transpose(1, 2).unsqueeze(-1)
            y = add(y, scale(_by_token(Cs[d] @ entering, P), read))

    y = y.reshape(batch, chunks * Q, H, P)
    if padding:
        y = y[:, :L]
    return y.to(x.dtype)


def _prefix_sums(A: Tensor, dt: Tensor, acc: torch.dtype) -> Tensor:
    """sum_{k<r} A dt_k for r = 0..Q. dt (Bc, Q, ..., H) -> (Bc, Q+1, ..., H), in float64 where the device has it.

    A term is cut off at the point where exp of it alone is zero in ``acc``: every sum that holds it stays zero after
    exp, and the prefix sums stay small enough for their differences to be exact to the last bits that matter.
    """
    dtype = torch.float32 if dt.device.type == 'mps' else torch.float64
    floor = -760.0 if acc == torch.float64 else -110.0
    terms = (A.to(dtype) * dt.to(dtype)).clamp(min=floor)
    return F.pad(terms.cumsum(1), (0, 0) * (dt.ndim - 2) + (1, 0))


def _by_group(t: Tensor, G: int) -> Tensor:
    """(Bc, Q, H, P) -> (Bc, G, Q, H/G * P)."""
    return t.unflatten(2, (G, t.shape[2] // G)).flatten(3).transpose(1, 2)


def _by_token(t: Tensor, P: int) -> Tensor:
    """(Bc, G, Q, H/G * P) -> (Bc, Q, H, P)."""
    return t.unflatten(3, (t.shape[3] // P, P)).transpose(1, 2).flatten(2, 3)


def _decays(dt: Tensor, sums: Tensor, diagonal: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """decay * dt of the entries of a chunk's matrix, in three tables.

    Args:
        dt: (Bc, 2, H, Q), the two directions.
        sums: Its prefix sums (Bc, 2, H, Q+1).
        diagonal: (Bc, H, Q), of the matrix itself.
        n: Tiles.
    Returns:
        rows (Bc, H, n, q, 2) and columns (Bc, H, n, 2, Q), whose product is zero in the tiles on the diagonal; and
        near (Bc, H, n, q, q), these tiles.
    """
    Q = dt.shape[-1]
    shape = (n, Q // n)
    tile = torch.arange(n, device=dt.device)[:, None]
    column = torch.arange(Q, device=dt.device) // shape[1]
    before, after = (t.unflatten(-1, shape) for t in (sums[..., :-1], sums[..., 1:]))  # (Bc, 2, H, n, q)
    left, right = before[:, 0, ..., :1], after[:, 1, ..., -1:]  # at the edges of a row's tile
    rows = torch.stack([before[:, 0] - left, right - after[:, 1]], -1).to(dt.dtype).exp()
    columns = torch.stack([left - sums[:, 0, :, None, 1:], sums[:, 1, :, None, :-1] - right], -2)
    unseen = torch.stack([column >= tile, column <= tile], 1)  # by a direction, (n, 2, Q)
    columns = scale(columns.masked_fill(unseen, float('-inf')).to(dt.dtype).exp(), dt.transpose(1, 2).unsqueeze(2))

    i = torch.arange(shape[1], device=dt.device)
    lower = i[:, None] > i
    near = torch.where(
        lower,
        before[:, 0].unsqueeze(-1) - after[:, 0].unsqueeze(-2),
        before[:, 1].unsqueeze(-2) - after[:, 1].unsqueeze(-1),
    )
    near = near.masked_fill(i[:, None] == i, 0.0).to(dt.dtype).exp()  # positive there, and exp might overflow
    dt = dt.unflatten(-1, shape).unsqueeze(-2)
    near = scale(near, torch.where(lower, dt[:, 0], dt[:, 1]))
    return rows, columns, _with_diagonal(near, diagonal.unflatten(-1, shape))


def _with_diagonal(t: Tensor, value: Tensor, dim1: int = -2, dim2: int = -1) -> Tensor:
    """A temporary t with another diagonal."""
    try:
        t.diagonal(dim1=dim1, dim2=dim2).copy_(value)
        return t
    except RuntimeError:  # in torch.func.vmap, where the mapped dimension may be the diagonal's alone
        return torch.diagonal_scatter(t, value, dim1=dim1, dim2=dim2)


def _mix_inside(*tensors: Tensor) -> Tensor:
    """What the tokens of a chunk tell each other, (Bc, Q, H, P).

    Args:
        tensors: Tables of ``_decays``; B_f, B_b, C_f, C_b (Bc, G, Q, N); x (Bc, Q, H, P).
    """
    if (
        tensors[-1].device.type != 'cpu'
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    ):
        return _mix_whole(*tensors)
    return _MixInCache.apply(*tensors)


def _mix_whole(
    rows: Tensor, columns: Tensor, near: Tensor, B_f: Tensor, B_b: Tensor, C_f: Tensor, C_b: Tensor, x: Tensor
) -> Tensor:
    """``_mix_inside`` for all chunks at once, in operations that autograd knows."""
    (_, Q, H, _), G, n = x.shape, B_f.shape[1], rows.shape[2]
    i = torch.arange(Q, device=x.device)
    scores = torch.where(i[:, None] > i, C_f @ B_f.transpose(-1, -2), C_b @ B_b.transpose(-1, -2)).masked_fill(
        i[:, None] == i, 1.0
    )
    M = _with_diagonal((rows @ columns).unflatten(-1, (n, Q // n)), near.movedim(2, -1), 2, 4)
    M = M.flatten(4).flatten(2, 3).unflatten(1, (G, H // G))  # (Bc, G, H/G, Q, Q)
    return (scale(M, scores.unsqueeze(2)).flatten(1, 2) @ x.transpose(1, 2)).transpose(1, 2)


class _MixInCache(torch.autograd.Function):
    """``_mix_inside`` for a few chunks at a time, each pass over their matrices in the cache. Saves its arguments."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        """y (Bc, Q, H, P)."""
        ctx.save_for_backward(*tensors)
        y = torch.empty_like(tensors[-1], memory_format=torch.contiguous_format)
        for at, decays, scores, _, x_heads, y_heads in _slices(tensors):
            x_heads.copy_(tensors[-1][at].transpose(1, 2))
            torch.matmul(decays.mul_(scores[0].unsqueeze(2)).flatten(1, 2), x_heads, out=y_heads)
            y[at] = y_heads.transpose(1, 2)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        """Gradients of all arguments."""
        tensors = ctx.saved_tensors
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(dy):  # create_graph, is_grads_batched
            return _differentiable_gradient(tensors, dy, ctx.needs_input_grad)
        rows, columns, near, B_f, B_b, C_f, C_b, x = tensors
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
        d_rows, d_columns, d_near, dB_f, dB_b, dC_f, dC_b, dx = grads
        n, q = near.shape[2:4]
        for at, decays, scores, M, x_heads, dy_heads in _slices(tensors):
            per_head = (-1, x.shape[2], *M.shape[-2:])
            torch.mul(decays, scores[0].unsqueeze(2), out=M)
            dy_heads.copy_(dy[at].transpose(1, 2))
            torch.matmul(M.view(per_head).transpose(-1, -2), dy_heads, out=x_heads)
            dx[at] = x_heads.transpose(1, 2)
            x_heads.copy_(x[at].transpose(1, 2))
            dM = torch.matmul(dy_heads, x_heads.transpose(-1, -2), out=M.view(per_head)).view_as(M)
            d_scores = torch.sum(decays.mul_(dM), 2, out=scores[1])
            d_tiles = dM.mul_(scores[0].unsqueeze(2)).view(per_head).unflatten(2, (n, q))  # (k, H, n, q, Q)
            d_near[at] = d_tiles.unflatten(4, (n, q)).diagonal(dim1=2, dim2=4).movedim(-1, 2)
            torch.matmul(d_tiles, columns[at].transpose(-1, -2), out=d_rows[at])
            torch.matmul(rows[at].transpose(-1, -2), d_tiles, out=d_columns[at])
            for part, B, C, dB, dC in (
                (torch.tril(d_scores, -1, out=scores[0]), B_f, C_f, dB_f, dC_f),
                (d_scores.triu_(1), B_b, C_b, dB_b, dC_b),
            ):
                torch.matmul(part, B[at], out=dC[at])
                torch.matmul(part.transpose(-1, -2), C[at], out=dB[at])
        return tuple(grads)


def _slices(tensors: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Slices of the chunks, with the factors of their matrices, in buffers that are used again.

    Yields:
        The slice; decays (k, G, H/G, Q, Q); scores (2, k, G, Q, Q), of which the first are the factors; room for a
        matrix, like decays; and for two tensors (k, H, Q, P).
    """
    rows, columns, near, B_f, B_b, C_f, C_b, x = tensors
    (chunks, Q, H, P), G, (n, q) = x.shape, B_f.shape[1], near.shape[2:4]
    # enough matrices to occupy the threads and to be worth a call, no more than caches hold
    size = max(1, min(chunks, max(2 * torch.get_num_threads(), _SLICE // Q**2) // H))
    lower = torch.ones(Q, Q, dtype=torch.bool).tril_(-1)
    matrices = x.new_empty(2, size, H, Q, Q)
    scores_of, heads = x.new_empty(2, size, G, Q, Q), x.new_empty(2, size, H, Q, P)
    for start in range(0, chunks, size):
        at = slice(start, min(start + size, chunks))
        k = at.stop - start
        decays, M = matrices[0, :k], matrices[1, :k]
        scores = scores_of[:, :k]
        torch.matmul(rows[at], columns[at], out=decays.unflatten(2, (n, q)))
        decays.view(k, H, n, q, n, q).diagonal(dim1=2, dim2=4).copy_(near[at].movedim(2, -1))
        for i, B, C in ((0, B_f, C_f), (1, B_b, C_b)):
            torch.matmul(C[at], B[at].transpose(-1, -2), out=scores[i])
        torch.where(lower, scores[0], scores[1], out=scores[0])
        scores[0].diagonal(dim1=-2, dim2=-1).fill_(1.0)
        by_group = (k, G, H // G, Q, Q)
        yield at, decays.view(by_group), scores, M.view(by_group), heads[0, :k], heads[1, :k]


def _differentiable_gradient(
    tensors: Sequence[Tensor], dy: Tensor, needed: Sequence[bool]
) -> tuple[Optional[Tensor], ...]:
    """Of ``_mix_whole``, with a graph."""
    with torch.enable_grad():
        wanted = [t for t, need in zip(tensors, needed) if need]
        grads = iter(torch.autograd.grad(_mix_whole(*tensors), wanted, dy, create_graph=True))
    return tuple(next(grads) if need else None for need in needed)


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
