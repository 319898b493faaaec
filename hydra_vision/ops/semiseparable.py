"""One direction of the state space model: the semiseparable operator, whose token reads what it has written itself.

    y_i = sum_{j <= i} C_i . B_j exp(A sum_{k=j+1}^{i} dt_k) dt_j x_j          (reverse: j >= i, k = i ... j-1)

In PyTorch it costs one direction. The Triton kernels compute both directions of the quasiseparable operator: there it
is row i + 1 of that operator's lower triangle over a sequence with one empty token appended, the upper triangle empty.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunked import _CHUNK, _SINGLE_CHUNK, _TILE, _by_group, _by_token, _prefix_sums, _scan
from .dispatch import choose_backend
from .quasiseparable import quasiseparable_matrix, quasiseparable_mix
from .reference import accumulation_dtype, add, scale

__all__ = ['semiseparable_matrix', 'semiseparable_mix']


def semiseparable_mix(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    reverse: bool = False,
    backend: str = 'auto',
) -> Tensor:
    """Mix tokens with the data-dependent semiseparable matrix, y = M x.

    Args:
        x: (B, L, H, P), L >= 1.
        dt: (B, L, H), step sizes after softplus, >= 0.
        A: (H,), < 0.
        B: (B, L, G, N), G divides H; head h reads group h * G // H.
        C: (B, L, G, N).
        reverse: From the last token to the first: the upper triangle.
        backend: As in ``quasiseparable_mix``.

    Returns:
        y (B, L, H, P), dtype of x. Sums are accumulated in float32, for float64 input in float64.

    Raises:
        ValueError: A shape that does not fit or an unknown backend.
        RuntimeError: The named backend cannot run here.
    """
    # its tiles depend on L, and it writes through views, which the ONNX exporter on top of traces does not know
    unfit = isinstance(x.shape[1], torch.SymInt) or (torch.jit.is_tracing() and torch.onnx.is_in_onnx_export())
    if choose_backend(backend, x.device) == 'chunked' and not unfit:
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):  # the decays and sums keep their float32
                return _mix_chunked(x, dt, A, B, C, reverse)
        return _mix_chunked(x, dt, A, B, C, reverse)
    y = quasiseparable_mix(*_one_half(reverse, A, *_with_empty_token(reverse, x, dt, B, C)), backend=backend)
    return y[:, :-1] if reverse else y[:, 1:]


def semiseparable_matrix(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, reverse: bool = False) -> Tensor:
    """The matrix M (B, H, L, L) of ``semiseparable_mix``, for tests and pictures: O(L^2) memory."""
    _, *half = _one_half(reverse, A, None, *_with_empty_token(reverse, dt, B, C))
    M = quasiseparable_matrix(*half)
    return M[..., :-1, 1:] if reverse else M[..., 1:, :-1]


def _with_empty_token(reverse: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
    """One token of zeros behind each (B, L, ...), or in front of it."""
    edge = (1, 0) if reverse else (0, 1)
    return tuple(F.pad(t, (0, 0) * (t.ndim - 2) + edge) for t in tensors)


def _one_half(reverse: bool, A: Tensor, x: 'Tensor | None', dt: Tensor, B: Tensor, C: Tensor) -> tuple:
    """Arguments of the quasiseparable operator with one half empty: a token with dt = 0 writes nothing."""
    none = dt * 0.0  # not zeros_like, which keeps the batch of a trace
    return x, *((none, dt) if reverse else (dt, none)), A, B, C, B, C


def _mix_chunked(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool) -> Tensor:
    """One direction, chunk by chunk: tiles on the diagonal, pairs of neighbouring spans, states between chunks.

    A chunk is 2 ** levels tiles. Beside the diagonal the matrix is scores with one factor a row and one a column:
    neighbours are joined in pairs, then pairs of pairs. With prefix sums P_r = sum_{k<r} A dt_k inside a chunk, the
    exponent is P[i+1] - P[j+1], reverse P[j] - P[i].
    """
    batch, L, H, P = x.shape
    G = B.shape[2]
    acc = accumulation_dtype(x.dtype)
    chunk = _SINGLE_CHUNK if L <= _SINGLE_CHUNK else _CHUNK
    chunks = -(-L // chunk)
    levels = 0  # a chunk is 2 ** levels tiles
    while -(-L // (chunks << levels)) > _TILE:
        levels += 1
    q = -(-L // (chunks << levels))
    Q = q << levels
    padding = chunks * Q - L

    def cut(t: Tensor) -> Tensor:
        """(B, L, ...) -> (B * c, Q, ...). Padded tokens have dt = 0: they neither write nor decay."""
        if padding:
            t = F.pad(t, (0, 0) * (t.ndim - 2) + (0, padding))
        return t.to(acc).unflatten(1, (chunks, Q)).flatten(0, 1)

    x_c, dt = cut(x), cut(dt)  # (Bc, Q, H, P), (Bc, Q, H)
    B, C = (cut(t).transpose(1, 2) for t in (B, C))  # (Bc, G, Q, N)
    sums = _prefix_sums(A, dt, acc)  # (Bc, Q+1, H), float64
    at = sums[:, :-1] if reverse else sums[:, 1:]

    # tiles on the diagonal
    tiles = (Q // q, q)
    at_tile, dt_tile = (t.unflatten(1, tiles).transpose(2, 3) for t in (at, dt))  # (Bc, tiles, H, q)
    exponent = at_tile.unsqueeze(-1) - at_tile.unsqueeze(-2)
    if reverse:
        exponent = -exponent
    i = torch.arange(q, device=x.device)
    seen = i[:, None] <= i[None, :] if reverse else i[:, None] >= i[None, :]
    tile = exponent.masked_fill(~seen, float('-inf')).to(acc).exp()  # (Bc, tiles, H, q, q)
    scores = (C.unflatten(2, tiles) @ B.unflatten(2, tiles).transpose(-1, -2)).transpose(1, 2)  # (Bc, tiles, G, q, q)
    tile = scale(tile.unflatten(2, (G, H // G)), scores.unsqueeze(3)).flatten(2, 3)
    tile = scale(tile, dt_tile.unsqueeze(-2))
    y = (tile @ x_c.unflatten(1, tiles).transpose(2, 3)).transpose(2, 3).reshape(x_c.shape)

    # pairs of neighbouring spans: the later one (reverse: the earlier one) reads the other
    span = q
    while span < Q:
        pair = (Q // (2 * span), 2, span)
        writer, reader = (1, 0) if reverse else (0, 1)
        at_both = at.unflatten(1, pair)  # (Bc, pairs, 2, span, H)
        middle = at_both[:, :, writer, :1] if reverse else at_both[:, :, writer, -1:]
        column, row = middle - at_both[:, :, writer], at_both[:, :, reader] - middle
        if reverse:
            column, row = -column, -row
        weighted = x_c.unflatten(1, pair)[:, :, writer] * (
            column.to(acc).exp() * dt.unflatten(1, pair)[:, :, writer]
        ).unsqueeze(-1)  # (Bc, pairs, span, H, P)
        C_read, B_written = C.unflatten(2, pair)[:, :, :, reader], B.unflatten(2, pair)[:, :, :, writer]
        scores = (C_read @ B_written.transpose(-1, -2)).transpose(1, 2)  # (Bc, pairs, G, span, span)
        heard = _by_token(scores.flatten(0, 1) @ _by_group(weighted.flatten(0, 1), G), P).view_as(weighted)
        y.unflatten(1, pair).select(2, reader).add_(scale(heard, row.to(acc).exp().unsqueeze(-1)))
        span *= 2

    if chunks > 1:
        total = sums[:, -1]
        write = at if reverse else total.unsqueeze(1) - at
        read = total.unsqueeze(1) - at if reverse else at
        weighted = x_c * (write.to(acc).exp() * dt).unsqueeze(-1)
        states = (B.transpose(-1, -2) @ _by_group(weighted, G)).unflatten(0, (batch, chunks))  # (B, c, G, N, H/G * P)
        entering = _scan(states, total.unflatten(0, (batch, chunks)), None, not reverse).flatten(0, 1)
        y = add(y, scale(_by_token(C @ entering, P), read.to(acc).exp().unsqueeze(-1)))
    y = y.unflatten(0, (batch, chunks)).flatten(1, 2)
    return (y[:, :L] if padding else y).to(x.dtype)
