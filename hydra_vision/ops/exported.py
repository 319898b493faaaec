"""The quasiseparable operator for exporters: a graph of as few nodes as possible, without writes through views.

``chunked.py`` is made for few passes over memory; its graph has hundreds of nodes, and the time that exporters take
grows faster than their number. Here both directions are one tensor, and there is one level of tiles instead of several:

* a fixed L up to 256 is one chunk: the matrix M, without states. O(L^2), as fast as chunks at 196, half so at 625;
* anything longer, and every symbolic L, is cut into chunks that hand on states. O(L), the same graph for all L.

The exponent of an entry (i, j) of M is the sum of a row's and a column's share, dt[j] as a logarithm among them:

    row[i] = S[i] - min(s[i], 0)     sum_{k<i} a_f        and   -sum_{k<=i} a_b
    col[j] = max(s[j], 0) - S[j]     -sum_{k<=j} a_f      and    sum_{k<j} a_b      (+ log dt[j])

The sums are taken in float64, as in ``chunked.py`` and for its reason.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import accumulation_dtype

__all__ = ['mix_exported']

_DENSE = 256  # a fixed L up to this long is one chunk
_CHUNK = 128  # of longer sequences, at most
_SYMBOLIC_CHUNK = 64  # where L is symbolic: the graph must not depend on it


def mix_exported(
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
    """y = M x. Arguments as in ``quasiseparable_mix``.

    Differentiable, but for a dt of exactly zero, whose gradient is not the definition's. Softplus reaches zero only
    where it has no slope.
    """
    batch, L, H, P = x.shape
    G, N = B_f.shape[2:]
    if torch.jit.is_tracing():  # by torch.onnx.export(dynamo=False): sizes are tensors there
        L, H, P, G, N = (int(n) for n in (L, H, P, G, N))
    acc = accumulation_dtype(x.dtype)
    symbolic = isinstance(L, torch.SymInt)
    if symbolic:
        Q = _SYMBOLIC_CHUNK
        chunks = (L + Q - 1) // Q + 1  # one of padding: a number that might be 1 would be asked whether it is
    else:
        chunks = 1 if L <= _DENSE else -(-L // _CHUNK)
        Q = -(-L // chunks)

    def cut(t: Tensor, *width: int, shift: int = 0) -> Tensor:
        """(B, L, ...) -> (B, c, Q, *width). Row i holds row i - shift; what lies outside is zero."""
        padding = chunks * Q - L - shift
        if symbolic or padding or shift:
            t = F.pad(t, (0, 0) * (t.ndim - 2) + (shift, padding))
        return t.reshape(batch, -1, Q, *width) if symbolic else t.reshape(-1, chunks, Q, *width)

    # Padded tokens have dt = 0: they neither write nor decay.
    wide = torch.float64
    dt = cut(torch.cat([dt_f, dt_b], -1), 2, H).permute(0, 1, 3, 4, 2).to(wide)  # (B, c, 2, H, Q)
    # exp of the bound is nothing beside 1, and exp of its negative, on the diagonal, is no overflow
    bound = 600.0 if acc == torch.float64 else 60.0
    signed = (torch.stack([A, -A]).to(wide).unsqueeze(-1) * dt).clamp(-bound, bound)
    row, col, total = _shares(signed)
    col = col + dt.clamp(min=torch.finfo(wide).tiny).log()

    # between the tokens of a chunk
    i = torch.arange(Q, device=x.device)
    lower, on_diagonal = i.unsqueeze(-1) > i, i.unsqueeze(-1) == i
    exponent_f, exponent_b = (row.unsqueeze(-1) + col.unsqueeze(-2)).unbind(2)
    tile = torch.where(lower, exponent_f, exponent_b).to(acc).exp()  # (B, c, H, Q, Q)
    xc = cut(_as(x, acc), H, P).transpose(2, 3)  # (B, c, H, Q, P)
    Bt_f, Bt_b = (cut(_as(t, acc), G, N).permute(0, 1, 3, 4, 2) for t in (B_f, B_b))  # (B, c, G, N, Q)
    C_f, C_b = (cut(_as(t, acc), G, N, shift=k).transpose(2, 3) for t, k in ((C_f, 1), (C_b, -1)))  # (B, c, G, Q, N)
    tile = tile * _per_head(torch.where(lower, C_f @ Bt_f, C_b @ Bt_b), H)
    diagonal = (
        0.0
        if D is None
        else cut(_as(D, acc) if D.ndim == 3 else _as(D, acc).expand(batch, L, H), H).transpose(2, 3).unsqueeze(-1)
    )
    y = torch.where(on_diagonal, diagonal, tile) @ xc  # (B, c, H, Q, P)

    # between chunks; a single one without a start state has nothing to hear from
    if symbolic or chunks > 1 or init_states is not None:
        write = (col + total.clamp(max=0.0)).to(acc).exp()  # (B, c, 2, H, Q)
        read = (row - total.clamp(min=0.0)).to(acc).exp()
        Bt, Ct = (_per_head(torch.stack(pair, 2), H) for pair in ((Bt_f, Bt_b), (C_f, C_b)))  # (B, c, 2, H, ...)
        states = (Bt * write.unsqueeze(-2)) @ xc.unsqueeze(2)  # (B, c, 2, H, N, P)
        start = None if init_states is None else _as(init_states, acc).transpose(-1, -2)
        entering = _scan(states, total.squeeze(-1), start)
        y = y + ((Ct * read.unsqueeze(-1)) @ entering).sum(2)

    y = y.transpose(2, 3)
    y = y.reshape(batch, -1, H, P) if symbolic else y.reshape(-1, chunks * Q, H, P)
    if symbolic or chunks * Q > L:
        y = y[:, :L]
    return _as(y, x.dtype)


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype), which leaves two nodes in the graph even where it does nothing."""
    return t if t.dtype == dtype else t.to(dtype)


def _shares(signed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """row and col of the module docstring, without log dt, and the last of S. Sums along the last dimension."""
    sums = signed.cumsum(-1)
    return sums - signed.clamp(max=0.0), signed.clamp(min=0.0) - sums, sums[..., -1:]


def _per_head(t: Tensor, H: int) -> Tensor:
    """(..., G, a, b) -> (..., 1 or H, a, b), to be broadcast: head h reads group h * G // H."""
    G = t.shape[-3]
    if G == 1:
        return t
    # not by repeat_interleave, whose negative dimensions the TorchScript exporter of ONNX gets wrong
    return t.unsqueeze(-3).expand(*(-1,) * (t.ndim - 2), H // G, -1, -1).flatten(-4, -3)


def _scan(states: Tensor, log_decay: Tensor, start: Optional[Tensor]) -> Tensor:
    """The state that enters each chunk from either side: what the chunks before it have left there.

    Args:
        states: (B, c, 2, H, N, P), what a chunk leaves to its right and to its left.
        log_decay: (B, c, 2, H), float64, of a chunk; negated from the right.
        start: (H, N, P) or None for zero.
    Returns:
        (B, c, 2, H, N, P).
    """
    signed = log_decay.permute(0, 2, 3, 1)  # (B, 2, H, c)
    row, col, total = _shares(signed)
    i = torch.arange(states.shape[1], device=states.device)
    later = i.unsqueeze(-1) > i
    before = torch.stack([later, later.transpose(0, 1)]).unsqueeze(1)  # (2, 1, c, c)
    exponent = (row.unsqueeze(-1) + col.unsqueeze(-2)).masked_fill(~before, float('-inf'))
    weight = exponent.to(states.dtype).exp()  # (B, 2, H, c, c)
    flat = states.flatten(4).permute(0, 2, 3, 1, 4)  # (B, 2, H, c, N * P)
    entering = (weight @ flat).permute(0, 3, 1, 2, 4).unflatten(-1, states.shape[4:])
    if start is None:
        return entering
    edge = (row - total.clamp(min=0.0)).to(states.dtype).exp()
    return entering + edge.permute(0, 3, 1, 2).unsqueeze(-1).unsqueeze(-1) * start
