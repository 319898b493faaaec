"""The selective scan of Mamba (S6), forward and backward: one program a sequence and block of channels.

A program walks over the tokens with its states (N, channels) in registers. Step sizes' bias and softplus and the skip
D are part of it; a scan from the last token to the first reads its rows in that order. Forward keeps the step sizes and
the states that enter each chunk of CHUNK tokens. Backward goes through the tokens from the end, two at a time (the
states of four spill), and computes their states again from the chunk's. Gradients that are sums over channels or
sequences are written in parts and summed by PyTorch: the same call gives the same bits.

At N = 16 a thread has 4 states of 4 channels: sums over states cost two shuffles, those over channels three.
"""

from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from .function import refuse_transforms
from .launch import launch

__all__ = ['selective_scan']

CHANNELS = 32  # a program
STATES = 16  # a warp
CHUNK = 8  # tokens between two saved states
MAX_STATE = 256

# strides are arguments of the kernels: the compiler may leave inputs as they are
_ANY_LAYOUT = {'tags': (torch.Tag.flexible_layout,)}


@triton.jit
def _at(t, L, REVERSE: tl.constexpr):
    """Row of the t-th token of the scan."""
    return tl.cast(L - 1 - t if REVERSE else t, tl.int64)


@triton.jit
def _row(ptr, t, stride, cols, ok, L, REVERSE: tl.constexpr):
    """Columns of the t-th token of the scan, zero beyond the last."""
    here = t + tl.zeros_like(cols)  # so that the mask is a tensor of booleans in the interpreter too
    return tl.load(ptr + _at(t, L, REVERSE) * stride + cols, mask=ok & (here < L), other=0.0)


@triton.jit
def _rows(p, strides, t, e, n, ok, okn, L, REVERSE: tl.constexpr):
    """x, dt, B, C of a token."""
    xv = _row(p[0], t, strides[0], e, ok, L, REVERSE)
    raw = _row(p[1], t, strides[1], e, ok, L, REVERSE)
    Bv = _row(p[2], t, strides[2], n, okn, L, REVERSE)
    Cv = _row(p[3], t, strides[3], n, okn, L, REVERSE)
    return xv, raw, Bv, Cv


@triton.jit
def _advance(h, xv, step, Bv, A2):
    """The state after a token, (NB, BE)."""
    return tl.exp2(step[None, :] * A2) * h + (step * xv.to(h.dtype))[None, :] * Bv.to(h.dtype)[:, None]


@triton.jit
def _output(
    h, row, t, A2, Dv, bv, y, steps, e, ok, L, E, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, SAVE: tl.constexpr
):
    """Stores y of a token, and its step size, and returns the state after it."""
    step = row[1].to(h.dtype) + bv
    if SOFTPLUS:
        small = tl.exp(-tl.abs(step))
        step = tl.maximum(step, 0.0) + tl.where(small > 1e-4, tl.log(1.0 + small), small)  # log1p
    h = _advance(h, row[0], step, row[2], A2)
    out = tl.sum(h * row[3].to(h.dtype)[:, None], axis=0) + Dv * row[0].to(h.dtype)
    at = _at(t, L, REVERSE) * E + e
    here = ok & (t + tl.zeros_like(e) < L)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=here)
    if SAVE:
        tl.store(steps + at, step, mask=here)
    return h


@triton.jit
def _constants(A, D, bias, e, n, ok, keep, N, HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr, ACC: tl.constexpr):
    """log2(e) A (NB, BE), D and bias (BE,)."""
    A2 = tl.load(A + e[None, :] * N + n[:, None], mask=keep, other=0.0).to(ACC) * 1.4426950408889634
    Dv = tl.zeros_like(e).to(ACC)
    bv = tl.zeros_like(e).to(ACC)
    if HAS_D:
        Dv += tl.load(D + e, mask=ok, other=0.0).to(ACC)
    if HAS_BIAS:
        bv += tl.load(bias + e, mask=ok, other=0.0).to(ACC)
    return A2, Dv, bv


@triton.jit
def selective_scan_kernel(
    x,  # (B, L, E) rows of any stride
    dt,  # (B, L, E)
    Bm,  # (B, L, N)
    Cm,  # (B, L, N)
    A,  # (E, N)
    D,  # (E,)
    bias,  # (E,)
    y,  # (B, L, E) contiguous, out
    steps,  # (B, L, E) contiguous, out: dt with its bias, after softplus
    states,  # (B, chunks, N, E) contiguous, out: what enters each chunk
    x_b,
    x_l,
    dt_b,
    dt_l,
    B_b,
    B_l,
    C_b,
    C_l,
    L,
    E,
    N: tl.constexpr,
    REVERSE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_D: tl.constexpr,
    SAVE: tl.constexpr,
    ACC: tl.constexpr,
    CHUNK: tl.constexpr,  # even
    NB: tl.constexpr,
    BE: tl.constexpr,
):
    blocks = tl.cdiv(E, BE)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    e = tl.program_id(0) % blocks * BE + tl.arange(0, BE)
    n = tl.arange(0, NB)
    ok = e < E
    okn = n < N
    keep = okn[:, None] & ok[None, :]
    A2, Dv, bv = _constants(A, D, bias, e, n, ok, keep, N, HAS_BIAS, HAS_D, ACC)
    p = (x + b * x_b, dt + b * dt_b, Bm + b * B_b, Cm + b * C_b)
    strides = (x_l, dt_l, B_l, C_l)
    y += b * L * E
    steps += b * L * E
    states += b * tl.cdiv(L, CHUNK) * N * E + n[:, None] * E + e[None, :]
    h = tl.zeros((NB, BE), ACC)
    n0 = _rows(p, strides, 0, e, n, ok, okn, L, REVERSE)
    n1 = _rows(p, strides, 1, e, n, ok, okn, L, REVERSE)
    for t in range(0, L, 2):
        if SAVE and t % CHUNK == 0:
            at = states + tl.cast(t // CHUNK, tl.int64) * (N * E)
            tl.store(at, h.to(states.dtype.element_ty), mask=keep)
        r0 = n0
        r1 = n1
        # the next two rows are on their way while these are used
        n0 = _rows(p, strides, t + 2, e, n, ok, okn, L, REVERSE)
        n1 = _rows(p, strides, t + 3, e, n, ok, okn, L, REVERSE)
        h = _output(h, r0, t, A2, Dv, bv, y, steps, e, ok, L, E, REVERSE, SOFTPLUS, SAVE)
        h = _output(h, r1, t + 1, A2, Dv, bv, y, steps, e, ok, L, E, REVERSE, SOFTPLUS, SAVE)


@triton.jit
def _token_gradients(
    sums,  # gradients of the state after the token, of A, D and bias
    before,  # the state before the token
    after,
    row,
    dout,
    t,
    A2,
    Dv,
    outs,
    e,
    n,
    ok,
    okn,
    L,
    E,
    N,
    REVERSE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """Stores the gradients of one token, and returns the sums with it."""
    g, dA, dD, dbias = sums
    ACC: tl.constexpr = before.dtype
    xv = row[0].to(ACC)
    step = row[1]
    Bv = row[2].to(ACC)
    dy = dout.to(ACC)
    at = _at(t, L, REVERSE)
    here = ok & (t + tl.zeros_like(e) < L)
    heren = okn & (t + tl.zeros_like(n) < L)
    written = step * xv
    decay = tl.exp2(step[None, :] * A2)  # (NB, BE)
    tl.store(outs[3] + at * N + n, tl.sum(dy[None, :] * after, axis=1), mask=heren)
    g += dy[None, :] * row[3].to(ACC)[:, None]
    tl.store(outs[2] + at * N + n, tl.sum(written[None, :] * g, axis=1), mask=heren)
    read = tl.sum(g * Bv[:, None], axis=0)
    tl.store(outs[0] + at * E + e, (step * read + Dv * dy).to(outs[0].dtype.element_ty), mask=here)
    g *= decay
    through = g * before
    dA += through * step[None, :]
    dstep = tl.sum(through * A2, axis=0) * 0.6931471805599453 + xv * read  # ln(2)
    if SOFTPLUS:  # its slope, 1 - exp(-step)
        series = step * (1.0 - step * (0.5 - step * (1.0 / 6.0 - step / 24.0)))
        dstep *= tl.where(step < 0.03, series, 1.0 - tl.exp(-step))
    tl.store(outs[1] + at * E + e, dstep.to(outs[1].dtype.element_ty), mask=here)
    return g, dA, dD + dy * xv, dbias + dstep


@triton.jit
def selective_scan_backward_kernel(
    x,  # as above, up to D
    steps,  # (B, L, E) contiguous: as saved
    Bm,
    Cm,
    A,
    D,
    g,  # (B, L, E) contiguous: gradient of y
    states,  # (B, chunks, N, E)
    dx,  # (B, L, E) contiguous, out
    ddt,  # the same
    dB,  # (blocks, B, L, N) contiguous, out: shares of the blocks of channels
    dC,  # the same
    dA,  # (B, E, N), out: shares of the sequences
    dD,  # (B, E), out
    dbias,  # (B, E), out
    x_b,
    x_l,
    B_b,
    B_l,
    C_b,
    C_l,
    batch,
    L,
    E,
    N: tl.constexpr,
    REVERSE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_D: tl.constexpr,
    ACC: tl.constexpr,
    CHUNK: tl.constexpr,  # even
    NB: tl.constexpr,
    BE: tl.constexpr,
):
    blocks = tl.cdiv(E, BE)
    block = (tl.program_id(0) % blocks).to(tl.int64)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    e = tl.program_id(0) % blocks * BE + tl.arange(0, BE)
    n = tl.arange(0, NB)
    ok = e < E
    okn = n < N
    keep = okn[:, None] & ok[None, :]
    A2, Dv, _ = _constants(A, D, D, e, n, ok, keep, N, False, HAS_D, ACC)
    p = (x + b * x_b, steps + b * L * E, Bm + b * B_b, Cm + b * C_b)
    strides = (x_l, E, B_l, C_l)
    g += b * L * E
    rows_n = (block * batch + b) * L * N
    outs = (dx + b * L * E, ddt + b * L * E, dB + rows_n, dC + rows_n)
    states += b * tl.cdiv(L, CHUNK) * N * E + n[:, None] * E + e[None, :]
    zero = tl.zeros((NB, BE), ACC)
    sums = (zero, zero, Dv * 0.0, Dv * 0.0)
    pairs = tl.cdiv(L, 2)
    for k in range(pairs):
        t = (pairs - 1 - k) * 2
        chunk = t // CHUNK
        h0 = tl.load(states + tl.cast(chunk, tl.int64) * (N * E), mask=keep, other=0.0).to(ACC)
        for s in range(chunk * CHUNK, t):
            r = _rows(p, strides, s, e, n, ok, okn, L, REVERSE)
            h0 = _advance(h0, r[0], r[1], r[2], A2)
        r0 = _rows(p, strides, t, e, n, ok, okn, L, REVERSE)
        r1 = _rows(p, strides, t + 1, e, n, ok, okn, L, REVERSE)
        g1 = _row(g, t + 1, E, e, ok, L, REVERSE)
        h1 = _advance(h0, r0[0], r0[1], r0[2], A2)
        h2 = _advance(h1, r1[0], r1[1], r1[2], A2)
        sums = _token_gradients(sums, h1, h2, r1, g1, t + 1, A2, Dv, outs, e, n, ok, okn, L, E, N, REVERSE, SOFTPLUS)
        r0 = _rows(p, strides, t, e, n, ok, okn, L, REVERSE)  # again: there are no registers to keep it in
        g0 = _row(g, t, E, e, ok, L, REVERSE)
        sums = _token_gradients(sums, h0, h1, r0, g0, t, A2, Dv, outs, e, n, ok, okn, L, E, N, REVERSE, SOFTPLUS)
    tl.store(dA + (b * E + e[None, :]) * N + n[:, None], sums[1], mask=keep)
    if HAS_D:
        tl.store(dD + b * E + e, sums[2], mask=ok)
    if HAS_BIAS:
        tl.store(dbias + b * E + e, sums[3], mask=ok)


def _block(E: int, N: int) -> tuple[int, dict[str, int]]:
    """Blocks of channels, and the compile-time sizes with the number of warps."""
    NB = triton.next_power_of_2(N)
    return triton.cdiv(E, CHANNELS), {
        'N': N, 'NB': NB, 'BE': CHANNELS, 'CHUNK': CHUNK, 'num_warps': max(1, NB // STATES)
    }  # fmt: skip


def _accumulator(x: Tensor) -> tuple[torch.dtype, tl.dtype]:
    return (torch.float64, tl.float64) if x.dtype == torch.float64 else (torch.float32, tl.float32)


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor], dt_bias: Optional[Tensor],
    softplus: bool, reverse: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, L, E = x.shape
    acc, ACC = _accumulator(x)
    y, steps, states = _results(x, A, save)
    x, dt, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, dt, B, C))
    A = A.contiguous()
    blocks, sizes = _block(E, A.shape[1])
    if batch:
        launch(selective_scan_kernel, (batch * blocks,),
            x, dt, B, C, A, A if D is None else D, A if dt_bias is None else dt_bias, y, steps, states,
            *(stride for t in (x, dt, B, C) for stride in t.stride()[:2]), L, E, REVERSE=reverse, SOFTPLUS=softplus,
            HAS_BIAS=dt_bias is not None, HAS_D=D is not None, SAVE=save, ACC=ACC, **sizes,
        )  # fmt: skip
    return y, steps, states


def _results(x: Tensor, A: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, E); for the backward pass, else empty, step sizes (B, L, E) and the states that enter each chunk."""
    batch, L, E = x.shape
    acc, _ = _accumulator(x)
    y = torch.empty(batch, L, E, dtype=x.dtype, device=x.device)
    if not save:
        return y, y.new_empty(0, dtype=acc), y.new_empty(0, dtype=acc)
    wide = torch.bfloat16 if x.dtype == torch.bfloat16 else acc  # float16 has not the range
    return y, torch.empty_like(y, dtype=acc), y.new_empty(batch, -(-L // CHUNK), A.shape[1], E, dtype=wide)


_forward = torch.library.custom_op('hydra_vision::selective_scan_fused', forward, mutates_args=(), **_ANY_LAYOUT)


@_forward.register_fake
def _(x, dt, A, B, C, D, dt_bias, softplus, reverse, save):
    return _results(x, A, save)


def backward(
    g: Tensor, x: Tensor, steps: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor], states: Tensor,
    dt_dtype: torch.dtype, softplus: bool, reverse: bool, biased: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D and dt_bias; empty for the last two where there is none."""
    batch, L, E = x.shape
    acc, ACC = _accumulator(x)
    g, steps, states, A = (t.contiguous() for t in (g, steps, states, A))
    x, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, B, C))
    blocks, sizes = _block(E, A.shape[1])

    def empty(*shape: int, dtype: torch.dtype = acc) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    dx, ddt = empty(batch, L, E, dtype=x.dtype), empty(batch, L, E, dtype=dt_dtype)
    dB, dC = (empty(blocks, batch, L, A.shape[1]) for _ in range(2))
    dA = empty(batch, *A.shape)
    dD, dbias = (empty(batch, E if wanted else 0) for wanted in (D is not None, biased))
    if batch:
        launch(selective_scan_backward_kernel, (batch * blocks,),
            x, steps, B, C, A, A if D is None else D, g, states, dx, ddt, dB, dC, dA, dD, dbias,
            *(stride for t in (x, B, C) for stride in t.stride()[:2]), batch, L, E, REVERSE=reverse, SOFTPLUS=softplus,
            HAS_BIAS=biased, HAS_D=D is not None, ACC=ACC, **sizes,
        )  # fmt: skip
    parts = ((dA, A), (dB, B), (dC, C), (dD, A if D is None else D), (dbias, A))
    return dx, ddt, *(part.sum(0).to(like.dtype) for part, like in parts)


_backward = torch.library.custom_op(
    'hydra_vision::selective_scan_fused_backward', backward, mutates_args=(), **_ANY_LAYOUT
)


@_backward.register_fake
def _(g, x, steps, A, B, C, D, states, dt_dtype, softplus, reverse, biased):
    E = x.shape[2]
    dx, ddt = (torch.empty(x.shape, dtype=dtype, device=x.device) for dtype in (x.dtype, dt_dtype))
    dA, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (A, B, C))
    return dx, ddt, dA, dB, dC, dA.new_empty(0 if D is None else E), dA.new_empty(E if biased else 0)


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, dt, A, B, C, D, dt_bias, softplus, reverse, _ = inputs
    _, steps, states = output
    ctx.save_for_backward(x, steps, A, B, C, D, states)
    ctx.rest = dt.dtype, softplus, reverse, dt_bias is not None


def _gradients(ctx, g: Tensor, *_: Any) -> tuple[Optional[Tensor], ...]:
    *grads, dD, dbias = _backward(g, *ctx.saved_tensors, *ctx.rest)
    return *grads, dD if ctx.saved_tensors[5] is not None else None, dbias if ctx.rest[-1] else None, None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    dt_bias: Optional[Tensor],
    softplus: bool,
    reverse: bool,
) -> Tensor:
    """y (B, L, E), dtype of x. Arguments as in ``hydra_vision.ops.selective_scan.selective_scan``.

    Raises:
        ValueError: More states than the kernels have registers for.
        RuntimeError: Inside a transform of torch.func.
    """
    if A.shape[1] > MAX_STATE:
        raise ValueError(
            f"A has shape {tuple(A.shape)}; backend 'triton' takes N <= {MAX_STATE}; backend 'chunked' takes any"
        )
    refuse_transforms()
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, dt, A, B, C, D, dt_bias))
    return _forward(x, dt, A, B, C, D, dt_bias, softplus, reverse, save)[0]
