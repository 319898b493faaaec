"""The selective scan of Mamba (S6): a state (N,) per channel, with a step size per token and channel.

    h_t = exp(dt_t A) * h_{t-1} + dt_t x_t B_t          (E, N), elementwise; h_{-1} = 0
    y_t = sum_n C_t[n] h_t[:, n] + D x_t

Paper: Gu, Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, https://arxiv.org/abs/2312.00752.

On CUDA it is one Triton kernel each way (triton/selective_scan.py). In PyTorch two levels cut the sequence into n
chunks of Q tokens and walks over the tokens of all chunks at once: once for what each chunk leaves behind, then, after
a walk over the n chunks, once more from the states that enter them. Q + n steps for the first result and Q for the
second; every exponent is <= 0. The backward pass keeps the inputs and the n states, and recomputes the others a few
chunks at a time.
"""

import importlib.util
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import check_backend_name, choose_backend, default_backend, is_exporting
from .reference import accumulation_dtype

__all__ = ['choose_scan_backend', 'scan_recurrence', 'selective_scan', 'selective_scan_matrix']

_RECOMPUTED = 64  # tokens whose states the backward pass holds at once


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor] = None,
    dt_bias: Optional[Tensor] = None,
    *,
    softplus: bool = False,
    reverse: bool = False,
    backend: str = 'auto',
) -> Tensor:
    """The selective scan, linear in L.

    Args:
        x: (B, L, E), L >= 1.
        dt: (B, L, E), step sizes, >= 0 with their bias and after softplus (not checked: it would cost a pass).
        A: (E, N), < 0 (not checked likewise).
        B: (B, L, N), shared by all channels.
        C: (B, L, N).
        D: (E,), the skip; None for none.
        dt_bias: (E,), added to dt; None for none.
        softplus: Whether dt, with its bias, still has to go through softplus.
        reverse: Scan from the last token to the first.
        backend: 'triton' (one kernel each way, the default on CUDA), 'chunked' (PyTorch, two levels), 'reference' (a
            loop over the tokens) or 'mamba_ssm' (its CUDA kernel); what 'auto' means is as in ``quasiseparable_mix``.

    Computed in float32, for float64 input in float64 (by 'mamba_ssm' always in float32).

    Returns:
        y (B, L, E), dtype of x.

    Raises:
        ValueError: A shape that does not fit, an unknown backend.
        RuntimeError: The named backend cannot run here.
    """
    name = choose_scan_backend(backend, x.device)
    if x.ndim != 3 or A.ndim != 2 or B.ndim != 3:
        raise ValueError(
            f'x has shape {tuple(x.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}; they must be (B, L, E), (E, N) and '
            '(B, L, N)'
        )
    batch, L, E = x.shape
    N = A.shape[1]
    shapes = {'dt': (batch, L, E), 'A': (E, N), 'B': (batch, L, N), 'C': B.shape, 'D': (E,), 'dt_bias': (E,)}
    for (argument, shape), t in zip(shapes.items(), (dt, A, B, C, D, dt_bias)):
        if t is not None and t.shape != shape:
            raise ValueError(f'{argument} has shape {tuple(t.shape)}; it must be {tuple(shape)}')
    if name == 'triton':
        from .triton.selective_scan import selective_scan as fused  # lazily: Triton is looked for only where it runs

        return fused(x, dt, A, B, C, D, dt_bias, softplus, reverse)
    dtype, acc = x.dtype, accumulation_dtype(x.dtype)
    skip = None if D is None else D.to(acc) * x
    x, dt, A, B, C = (t.to(acc) for t in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(acc)
    if softplus:
        dt = F.softplus(dt)
    if reverse:
        x, dt, B, C = (t.flip(1) for t in (x, dt, B, C))
    if name == 'mamba_ssm':
        y = _scan_mamba_ssm(x, dt, A, B, C)
    elif name == 'reference':
        y = scan_recurrence(x, dt, A, B, C)
    elif torch.jit.is_tracing() or (is_exporting() and not isinstance(L, torch.SymInt)):
        y, _ = _scan(x, dt, A, B, C)  # plain operators: a graph that can be saved and converted
    else:
        y, _ = _two_levels(x, dt, A, B, C)
    y = y.flip(1) if reverse else y
    return (y if skip is None else y + skip).to(dtype)


def choose_scan_backend(backend: str, device: torch.device) -> str:
    """The backend that will run for tensors on ``device``: as ``dispatch.choose_backend``, and mamba_ssm has its scan.

    Raises:
        ValueError: Unknown name.
        RuntimeError: Named but not able to run.
    """
    check_backend_name(backend)
    name = default_backend(device)[0] if backend == 'auto' else backend
    if name == 'mamba_ssm' and importlib.util.find_spec('mamba_ssm') is not None:
        reason = _mamba_ssm_reason()
        if reason is not None:
            raise RuntimeError(f'backend {name!r} is not available: {reason}')
    return choose_backend(name, device)


def _mamba_ssm_reason() -> Optional[str]:
    """None where mamba_ssm has its CUDA scan, else what is missing: since July 2026 its wheels come without it."""
    try:
        from mamba_ssm.ops import selective_scan_interface
    except ImportError as error:
        return f'mamba_ssm does not import ({error})'
    if getattr(selective_scan_interface, 'selective_scan_cuda', None) is None:
        return (
            'this mamba_ssm was built without selective_scan_cuda '
            '(MAMBA_KEEP_CUDA_BUILD=TRUE pip install mamba-ssm --no-build-isolation)'
        )
    return None


def _scan_mamba_ssm(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, Bt, Ct = (t.transpose(-1, -2).contiguous().float() for t in (x, dt, B, C))
    return selective_scan_fn(u, delta, A.float(), Bt, Ct).transpose(-1, -2).to(x.dtype)


def selective_scan_matrix(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, reverse: bool = False) -> Tensor:
    """The matrix of each channel, (B, E, L, L), for tests and pictures: O(E L^2) memory. Arguments as above.

    M[i, j] = sum_n C_i[n] exp(A[e, n] sum_{k=j+1..i} dt_k[e]) B_j[n] dt_j[e] for i >= j (``reverse``: i <= j).
    """
    acc = accumulation_dtype(dt.dtype)
    if reverse:
        return selective_scan_matrix(*(t.flip(1) if t.ndim == 3 else t for t in (dt, A, B, C))).flip(-1, -2)
    dt, A, B, C = (t.to(acc) for t in (dt, A, B, C))
    sums = dt.double().cumsum(1).transpose(-1, -2)  # (B, E, L)
    elapsed = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).clamp(min=0).to(acc)
    M = torch.zeros_like(elapsed)
    for n in range(A.shape[1]):
        M += torch.exp(A[:, n, None, None] * elapsed) * (C[:, :, n, None] * B[:, None, :, n]).unsqueeze(1)
    return torch.tril(M * dt.transpose(-1, -2).unsqueeze(-2))


def scan_recurrence(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The definition, token by token: what the other forms are tested against."""
    h = x.new_zeros(x.shape[0], *A.shape)
    ys = []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t]).unsqueeze(-1) * B[:, t, None, :]
        ys.append((h * C[:, t, None, :]).sum(-1))
    return torch.stack(ys, 1)


def _cut(L: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, L, ...) -> (B, n, Q, ...) with about as many chunks as tokens in each. Padded tokens have dt = 0."""
    if torch.jit.is_tracing():
        L = int(L)  # a tensor there
    chunks = max(1, round(L**0.5))
    Q = -(-L // chunks)
    chunks = -(-L // Q)
    padding = chunks * Q - L
    if padding:
        tensors = tuple(torch.nn.functional.pad(t, (0, 0, 0, padding)) for t in tensors)
    return tuple(t.unflatten(1, (chunks, Q)) for t in tensors)


def _step(h: Optional[Tensor], x: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The state (..., E, N) after a token; before it h, None for zero. x, dt (..., E), B (..., N)."""
    write = (dt * x).unsqueeze(-1) * B.unsqueeze(-2)
    return write if h is None else torch.exp(dt.unsqueeze(-1) * A) * h + write


def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """y (B, L, E), and the state (B, n, E, N) that enters each chunk."""
    L = x.shape[1]
    x, dt, B, C = _cut(L, x, dt, B, C)
    chunks, Q = x.shape[1:3]
    h = None
    if chunks > 1:
        for q in range(Q):
            h = _step(h, x[:, :, q], dt[:, :, q], A, B[:, :, q])
        decay = torch.exp(dt.sum(2).unsqueeze(-1) * A)  # of a whole chunk, (B, n, E, N)
        entering = [h[:, 0]]
        for c in range(1, chunks - 1):
            entering.append(decay[:, c] * entering[-1] + h[:, c])
        h = torch.nn.functional.pad(torch.stack(entering, 1), (0, 0, 0, 0, 1, 0))  # zero enters the first
    else:
        h = x.new_zeros(x.shape[0], 1, *A.shape)
    states, ys = h, []
    for q in range(Q):
        h = _step(h, x[:, :, q], dt[:, :, q], A, B[:, :, q])
        ys.append((h * C[:, :, q].unsqueeze(-2)).sum(-1))
    return torch.stack(ys, 2).flatten(1, 2)[:, :L], states


@torch.library.custom_op('hydra_vision::selective_scan', mutates_args=())
def _two_levels(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    y, states = _scan(x, dt, A, B, C)
    return y.contiguous(), states.contiguous()


@_two_levels.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    L = x.shape[1]
    chunks = torch.library.get_ctx().new_dynamic_size() if isinstance(L, torch.SymInt) else _cut(L, x)[0].shape[1]
    return x.new_empty(x.shape), x.new_empty(x.shape[0], chunks, *A.shape)


@torch.library.custom_op('hydra_vision::selective_scan_backward', mutates_args=())
def _two_levels_backward(
    grad: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C. With g the gradient of the state, g_t = C_t dy_t + exp(dt_{t+1} A) g_{t+1}:

    dC_t = sum_e dy_t h_t;  dB_t = sum_e g_t dt_t x_t;  dx_t = dt_t sum_n g_t B_t;
    ddt_t = sum_n g_t (A exp(dt_t A) h_{t-1} + B_t x_t);  dA = sum_t g_t dt_t exp(dt_t A) h_{t-1}
    """
    L = x.shape[1]
    grad, x, dt, B, C = _cut(L, grad, x, dt, B, C)
    chunks, Q = x.shape[1:3]

    # what a chunk passes on to the one before it: decay times (its own part + what it hears from behind)
    g = torch.zeros_like(states)
    for q in reversed(range(Q)):
        g = g + grad[:, :, q].unsqueeze(-1) * C[:, :, q].unsqueeze(-2)
        g = g * torch.exp(dt[:, :, q].unsqueeze(-1) * A)
    decay = torch.exp(dt.sum(2).unsqueeze(-1) * A)
    behind = [torch.zeros_like(g[:, 0])]
    for c in reversed(range(1, chunks)):
        behind.append(g[:, c] + decay[:, c] * behind[-1])
    behind = torch.stack(behind[::-1], 1)

    grad_x, grad_dt, grad_B, grad_C = (torch.empty_like(t) for t in (x, dt, B, C))
    grad_A = torch.zeros_like(A)
    step = max(1, _RECOMPUTED // Q)
    for first in range(0, chunks, step):
        part = slice(first, first + step)
        before = [states[:, part]]
        for q in range(Q - 1):
            before.append(_step(before[-1], x[:, part, q], dt[:, part, q], A, B[:, part, q]))
        g = behind[:, part]
        for q in reversed(range(Q)):
            xq, dtq, Bq, dy = x[:, part, q], dt[:, part, q], B[:, part, q], grad[:, part, q]
            decayed = torch.exp(dtq.unsqueeze(-1) * A)
            h = decayed * before[q]
            after = h + (dtq * xq).unsqueeze(-1) * Bq.unsqueeze(-2)
            g = g + dy.unsqueeze(-1) * C[:, part, q].unsqueeze(-2)
            grad_C[:, part, q] = (dy.unsqueeze(-1) * after).sum(-2)
            grad_B[:, part, q] = (g * (dtq * xq).unsqueeze(-1)).sum(-2)
            read = (g * Bq.unsqueeze(-2)).sum(-1)
            grad_x[:, part, q] = dtq * read
            through = g * h
            grad_dt[:, part, q] = (through * A).sum(-1) + xq * read
            grad_A += (through * dtq.unsqueeze(-1)).sum((0, 1))
            g = g * decayed
    grads = (t.flatten(1, 2)[:, :L].contiguous() for t in (grad_x, grad_dt, grad_B, grad_C))
    grad_x, grad_dt, grad_B, grad_C = grads
    return grad_x, grad_dt, grad_A, grad_B, grad_C


@_two_levels_backward.register_fake
def _(grad: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, states: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, A, B, C))


def _keep_for_backward(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx, grad: Tensor, _: Optional[Tensor]) -> tuple[Tensor, ...]:
    return _two_levels_backward(grad.contiguous(), *ctx.saved_tensors)


_two_levels.register_autograd(_backward, setup_context=_keep_for_backward)
