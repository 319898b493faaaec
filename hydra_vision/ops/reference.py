"""The quasiseparable operator, twice, in the plainest PyTorch that says what it means. This file is the specification.

* :func:`dense_matrix` and :func:`mix_dense` build the L x L matrix M entry by entry from the definition. O(L^2).
* :func:`mix_recurrence` walks over the tokens, one state update a step. O(L), slow, independent of the dense form.

Definition (Hwang, Lahoti, Dao, Gu, "Hydra", NeurIPS 2024, eq. 3 and prop. 3.7; where the paper's subscripts differ from
the released code, the released code decides). 0-based, one matrix per batch element and head, group g = h * G // H:

    i > j:  M[i, j] = C_f[i-1] . B_f[j] * exp(A * sum_{k=j+1}^{i-1} dt_f[k]) * dt_f[j]
    i < j:  M[i, j] = C_b[i+1] . B_b[j] * exp(A * sum_{k=i+1}^{j-1} dt_b[k]) * dt_b[j]
    i = j:  M[i, i] = D_i

With a start state S0 (P, N) per head the two recurrences begin from it instead of from zero:

    y[i] += C_f[i-1] . S0 * exp(A * sum_{k=0}^{i-1} dt_f[k])      for i >= 1
    y[i] += C_b[i+1] . S0 * exp(A * sum_{k=i+1}^{L-1} dt_b[k])    for i <= L-2
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['accumulation_dtype', 'dense_matrix', 'mix_dense', 'mix_recurrence', 'scale', 'shift_tokens']


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every narrower type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shift_tokens(t: Tensor, offset: int) -> Tensor:
    """Row i of the result is row i + offset of ``t`` (B, L, ...), zero where that row does not exist."""
    before, after = max(-offset, 0), max(offset, 0)
    L = t.shape[1]
    padded = F.pad(t, (0, 0) * (t.ndim - 2) + (before, after))
    return padded.narrow(1, after, L)


def scale(t: Tensor, factor: Tensor) -> Tensor:
    """t * factor for a temporary t that nobody else holds: in its own memory unless autograd needs t again.

    On the CPU a fresh result costs more in page faults than in arithmetic. ``torch.jit.trace`` compares a graph that
    was recorded with autograd to one without: both must hold the same operations.
    """
    if torch.jit.is_tracing() or (torch.is_grad_enabled() and (t.requires_grad or factor.requires_grad)):
        return t * factor
    try:
        return t.mul_(factor)
    except RuntimeError:  # in torch.func.vmap, where the mapped dimension may be the factor's alone
        return t * factor


def add(t: Tensor, other: Tensor) -> Tensor:
    """t + other for a temporary t, in its own memory."""
    try:
        return t.add_(other)
    except RuntimeError:  # as above
        return t + other


def _interval_sums(a: Tensor) -> Tensor:
    """S[..., r, j] = sum_{k=j}^{r-1} a[..., k] for 0 <= j <= r <= L, else 0. (..., L) -> (..., L+1, L+1).

    Each column is summed on its own: a difference of two prefix sums would lose the small sums next to large ones.
    """
    L = a.shape[-1]
    k = torch.arange(L, device=a.device)
    j = torch.arange(L + 1, device=a.device)
    summand = a.unsqueeze(-1).masked_fill(k[:, None] < j[None, :], 0.0)  # (..., L, L+1)
    return F.pad(summand.cumsum(-2), (0, 0, 1, 0))  # (..., L+1, L+1)


def dense_matrix(
    dt_f: Tensor,
    dt_b: Tensor,
    A: Tensor,
    B_f: Tensor,
    C_f: Tensor,
    B_b: Tensor,
    C_b: Tensor,
    D: Optional[Tensor] = None,
) -> Tensor:
    """M (B, H, L, L) of the module docstring, in the accumulation dtype of ``B_f``."""
    acc = accumulation_dtype(B_f.dtype)
    L, H = dt_f.shape[1:]
    dt_f, dt_b = (dt.to(acc).transpose(1, 2) for dt in (dt_f, dt_b))  # (B, H, L)
    A = A.to(acc)[:, None]
    B_f, B_b = (_per_head(t.to(acc), H) for t in (B_f, B_b))  # (B, H, L, N)
    C_f = _per_head(shift_tokens(C_f.to(acc), -1), H)  # row i holds C_f[i-1]
    C_b = _per_head(shift_tokens(C_b.to(acc), +1), H)  # row i holds C_b[i+1]

    i = torch.arange(L, device=dt_f.device)
    lower, upper = i[:, None] > i[None, :], i[:, None] < i[None, :]
    # Exponents are masked before exp: exp of a masked positive difference would be inf, and inf * 0 is nan.
    sums_f = _interval_sums(A * dt_f)[..., :-1, 1:].masked_fill(~lower, 0.0)  # [i, j] -> sum over [j+1, i)
    sums_b = _interval_sums(A * dt_b)[..., :-1, 1:].transpose(-1, -2).masked_fill(~upper, 0.0)  # sum over [i+1, j)
    M = (C_f @ B_f.mT) * sums_f.exp() * dt_f.unsqueeze(-2) * lower
    M = M + (C_b @ B_b.mT) * sums_b.exp() * dt_b.unsqueeze(-2) * upper
    if D is not None:
        diagonal = (D if D.ndim == 3 else D.expand(M.shape[0], L, H)).to(acc).transpose(1, 2)  # (B, H, L)
        M = M + torch.diag_embed(diagonal)
    return M


def mix_dense(
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
    """y = M x through the dense matrix. x (B, L, H, P) -> (B, L, H, P), dtype of x."""
    acc = accumulation_dtype(x.dtype)
    H = x.shape[2]
    M = dense_matrix(dt_f, dt_b, A, B_f, C_f, B_b, C_b, D).to(acc)
    y = torch.einsum('bhij,bjhp->bihp', M, x.to(acc))
    if init_states is not None:
        states = init_states.to(acc)
        a_f, a_b = (dt.to(acc) * A.to(acc) for dt in (dt_f, dt_b))  # (B, L, H)
        decay_f = shift_tokens(a_f.cumsum(1), -1).exp()  # sum over [0, i)
        decay_b = shift_tokens(a_b.flip(1).cumsum(1).flip(1), +1).exp()  # sum over [i+1, L)
        C_f = _per_head(shift_tokens(C_f.to(acc), -1), H)
        C_b = _per_head(shift_tokens(C_b.to(acc), +1), H)
        y = y + torch.einsum('bhin,hpn,bih->bihp', C_f, states, decay_f)
        y = y + torch.einsum('bhin,hpn,bih->bihp', C_b, states, decay_b)
    return y.to(x.dtype)


def mix_recurrence(
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
    """y = M x token by token: h <- exp(A dt) h + dt x B^T, read by the *next* token's row. For tests only."""
    acc = accumulation_dtype(x.dtype)
    batch, L, H, P = x.shape
    N = B_f.shape[-1]
    xa, Aa = x.to(acc), A.to(acc)

    def one_direction(dt: Tensor, Bt: Tensor, Ct: Tensor, order: list[int]) -> list[Tensor]:
        dt, Bt, Ct = dt.to(acc), _per_head(Bt.to(acc), H), _per_head(Ct.to(acc), H)
        h = xa.new_zeros(batch, H, P, N) if init_states is None else init_states.to(acc).expand(batch, H, P, N)
        rows: list[Tensor] = [xa.new_zeros(batch, H, P)] * L
        for previous, k in zip([None, *order[:-1]], order):
            if previous is not None:  # the first token in scan order has nothing before it
                rows[k] = torch.einsum('bhpn,bhn->bhp', h, Ct[:, :, previous])
            decay = (Aa * dt[:, k]).exp()[..., None, None]  # (B, H, 1, 1)
            h = decay * h + dt[:, k, :, None, None] * xa[:, k, :, :, None] * Bt[:, :, k, None, :]
            # the state after token k is read with C[k] by the next token in scan order
        return rows

    forward = one_direction(dt_f, B_f, C_f, list(range(L)))
    backward = one_direction(dt_b, B_b, C_b, list(range(L - 1, -1, -1)))
    y = torch.stack([f + b for f, b in zip(forward, backward)], dim=1)
    if D is not None:
        y = y + D.to(acc).unsqueeze(-1) * xa
    return y.to(x.dtype)


def _per_head(t: Tensor, H: int) -> Tensor:
    """(B, L, G, N) -> (B, H, L, N): head h reads group h * G // H."""
    return t.transpose(1, 2).repeat_interleave(H // t.shape[2], 1)
