"""The selective scan of Mamba (S6), forward and backward: one program a sequence and block of channels.

A program walks over the tokens with its states (N, channels) in registers. Step sizes' bias and softplus and the skip D
are part of it; a scan from the last token to the first reads its rows in that order. Forward keeps the states that enter
each chunk of CHUNK tokens. Backward goes through the tokens from the end, a few at a time, and computes their states
again from the chunk's. Gradients that are sums over channels or sequences are written in parts and summed by PyTorch:
the same call gives the same bits.
"""

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from .function import refuse_transforms
from .launch import launch

__all__ = ['selective_scan']

CHANNELS = 32  # a program
STATES = 16  # a warp
CHUNK = 16  # tokens between two saved states: 4 bytes a token and channel for 16 states


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
def _step_size(raw, SOFTPLUS: tl.constexpr):
    """dt, and what its gradient is multiplied by."""
    if SOFTPLUS:
        e = tl.exp(-tl.abs(raw))
        step = tl.maximum(raw, 0.0) + tl.where(e > 1e-4, tl.log(1.0 + e), e)  # log1p
        slope = tl.where(raw >= 0, 1.0, e) / (1.0 + e)
    else:
        step = raw
        slope = tl.zeros_like(raw) + 1.0
    return step, slope


@triton.jit
def _advance(h, xv, raw, Bv, A2, bv, SOFTPLUS: tl.constexpr):
    """The state after a token, (NB, BE)."""
    ACC: tl.constexpr = h.dtype
    step, _ = _step_size(raw.to(ACC) + bv, SOFTPLUS)
    return tl.exp2(step[None, :] * A2) * h + (step * xv.to(ACC))[None, :] * Bv.to(ACC)[:, None]


@triton.jit
def _output(h, row, t, A2, bv, Dv, y, e, ok, L, E, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Stores y of a token and returns the state after it."""
    h = _advance(h, row[0], row[1], row[2], A2, bv, SOFTPLUS)
    out = tl.sum(h * row[3].to(h.dtype)[:, None], axis=0) + Dv * row[0].to(h.dtype)
    here = t + tl.zeros_like(e)
    tl.store(y + _at(t, L, REVERSE) * E + e, out.to(y.dtype.element_ty), mask=ok & (here < L))
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
    states += b * tl.cdiv(L, CHUNK) * N * E + n[:, None] * E + e[None, :]
    h = tl.zeros((NB, BE), ACC)
    n0 = _rows(p, strides, 0, e, n, ok, okn, L, REVERSE)
    n1 = _rows(p, strides, 1, e, n, ok, okn, L, REVERSE)
    for t in range(0, L, 2):
        if SAVE:
            if t % CHUNK == 0:
                tl.store(states + (t // CHUNK).to(tl.int64) * (N * E), h, mask=keep)
        r0 = n0
        r1 = n1
        # the next two rows are on their way while these are used
        n0 = _rows(p, strides, t + 2, e, n, ok, okn, L, REVERSE)
        n1 = _rows(p, strides, t + 3, e, n, ok, okn, L, REVERSE)
        h = _output(h, r0, t, A2, bv, Dv, y, e, ok, L, E, REVERSE, SOFTPLUS)
        h = _output(h, r1, t + 1, A2, bv, Dv, y, e, ok, L, E, REVERSE, SOFTPLUS)


@triton.jit
def _token_gradients(
    sums, before, row, dout, t, A2, bv, Dv, outs, e, n, ok, okn, L, E, N, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr
):
    """One token backwards, ``before``: the state before it. sums: gradients of the state after it, of A, D, bias."""
    g, dA, dD, dbias = sums
    ACC: tl.constexpr = before.dtype
    xv = row[0].to(ACC)
    Bv = row[2].to(ACC)
    dy = dout.to(ACC)
    step, slope = _step_size(row[1].to(ACC) + bv, SOFTPLUS)
    at = _at(t, L, REVERSE)
    here = ok & (t + tl.zeros_like(e) < L)
    heren = okn & (t + tl.zeros_like(n) < L)
    written = step * xv
    decay = tl.exp2(step[None, :] * A2)  # (NB, BE)
    decayed = decay * before
    after = decayed + written[None, :] * Bv[:, None]
    g += dy[None, :] * row[3].to(ACC)[:, None]
    tl.store(outs[3] + at * N + n, tl.sum(dy[None, :] * after, axis=1), mask=heren)
    tl.store(outs[2] + at * N + n, tl.sum(written[None, :] * g, axis=1), mask=heren)
    read = tl.sum(g * Bv[:, None], axis=0)
    tl.store(outs[0] + at * E + e, (step * read + Dv * dy).to(outs[0].dtype.element_ty), mask=here)
    through = g * decayed
    draw = (tl.sum(through * A2, axis=0) * 0.6931471805599453 + xv * read) * slope  # ln(2)
    tl.store(outs[1] + at * E + e, draw.to(outs[1].dtype.element_ty), mask=here)
    return g * decay, dA + through * step[None, :], dD + dy * xv, dbias + draw


@triton.jit
def selective_scan_backward_kernel(
    x,  # as above
    dt,
    Bm,
    Cm,
    A,
    D,
    bias,
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
    dt_b,
    dt_l,
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
    CHUNK: tl.constexpr,
    NB: tl.constexpr,
    BE: tl.constexpr,
    KEEP: tl.constexpr,  # tokens whose states are in registers: 2 or 4, divides CHUNK
):
    blocks = tl.cdiv(E, BE)
    block = (tl.program_id(0) % blocks).to(tl.int64)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    e = tl.program_id(0) % blocks * BE + tl.arange(0, BE)
    n = tl.arange(0, NB)
    ok = e < E
    okn = n < N
    keep = okn[:, None] & ok[None, :]
    A2, Dv, bv = _constants(A, D, bias, e, n, ok, keep, N, HAS_BIAS, HAS_D, ACC)
    p = (x + b * x_b, dt + b * dt_b, Bm + b * B_b, Cm + b * C_b)
    strides = (x_l, dt_l, B_l, C_l)
    g += b * L * E
    rows_n = (block * batch + b) * L * N
    outs = (dx + b * L * E, ddt + b * L * E, dB + rows_n, dC + rows_n)
    states += b * tl.cdiv(L, CHUNK) * N * E + n[:, None] * E + e[None, :]
    zero = tl.zeros((NB, BE), ACC)
    sums = (zero, zero, Dv * 0.0, Dv * 0.0)
    groups = tl.cdiv(L, KEEP)
    for k in range(groups):
        t = (groups - 1 - k) * KEEP
        chunk = t // CHUNK
        h0 = tl.load(states + chunk.to(tl.int64) * (N * E), mask=keep, other=0.0)
        for s in range(chunk * CHUNK, t):
            r = _rows(p, strides, s, e, n, ok, okn, L, REVERSE)
            h0 = _advance(h0, r[0], r[1], r[2], A2, bv, SOFTPLUS)
        r0 = _rows(p, strides, t, e, n, ok, okn, L, REVERSE)
        r1 = _rows(p, strides, t + 1, e, n, ok, okn, L, REVERSE)
        h1 = _advance(h0, r0[0], r0[1], r0[2], A2, bv, SOFTPLUS)
        if KEEP == 4:
            r2 = _rows(p, strides, t + 2, e, n, ok, okn, L, REVERSE)
            r3 = _rows(p, strides, t + 3, e, n, ok, okn, L, REVERSE)
            h2 = _advance(h1, r1[0], r1[1], r1[2], A2, bv, SOFTPLUS)
            h3 = _advance(h2, r2[0], r2[1], r2[2], A2, bv, SOFTPLUS)
            g3 = _row(g, t + 3, E, e, ok, L, REVERSE)
            sums = _token_gradients(
                sums, h3, r3, g3, t + 3, A2, bv, Dv, outs, e, n, ok, okn, L, E, N, REVERSE, SOFTPLUS
            )
            g2 = _row(g, t + 2, E, e, ok, L, REVERSE)
            sums = _token_gradients(
                sums, h2, r2, g2, t + 2, A2, bv, Dv, outs, e, n, ok, okn, L, E, N, REVERSE, SOFTPLUS
            )
        g1 = _row(g, t + 1, E, e, ok, L, REVERSE)
        sums = _token_gradients(sums, h1, r1, g1, t + 1, A2, bv, Dv, outs, e, n, ok, okn, L, E, N, REVERSE, SOFTPLUS)
        g0 = _row(g, t, E, e, ok, L, REVERSE)
        sums = _token_gradients(sums, h0, r0, g0, t, A2, bv, Dv, outs, e, n, ok, okn, L, E, N, REVERSE, SOFTPLUS)
    tl.store(dA + (b * E + e[None, :]) * N + n[:, None], sums[1], mask=keep)
    if HAS_D:
        tl.store(dD + b * E + e, sums[2], mask=ok)
    if HAS_BIAS:
        tl.store(dbias + b * E + e, sums[3], mask=ok)
