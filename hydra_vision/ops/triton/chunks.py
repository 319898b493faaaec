"""Stages around the product with whole chunks (hopper_mix.py): exponents, scores, states, gradients of all of them.

A sequence is nC chunks of NT tiles of 64 tokens; token t of chunk c is c * 64 NT + t. Up to 200 tokens are one chunk,
and nothing but S leaves a program. Arrays that belong to chunks are chunk-major, (B * nC, H, ...), and 256 rows long.
"""

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decay import DT_TINY, _head_decay, _load_dt, _softplus, log2
from .launch import launch
from .plan import Plan, architecture, fast_math, launch_is_forced
from .scores import load_cols, load_rows


@triton.jit
def _write_exponents(
    dtf_in, dtb_in, dt_bias, A, table, transposed, totals, chunk, heads, stride_b, stride_l, L, H, nC, DT_MIN, DT_MAX,
    SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr, A_IS_LOG: tl.constexpr, FAST: tl.constexpr, BOTH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """log2 of the decays, summed over the chunk: l_f[t] from its first token through t, l_b[t] from t through its last.

    M: left = l_f[t - 1], left column = l_f[t] - log2 dt_f[t], right = l_b[t + 1], right column = l_b[t] - log2 dt_b[t].
    M^T: left = total_b - (l_b[t] - log2 dt_b[t]), left column = total_b - l_b[t + 1]; right likewise from l_f.
    """
    b = chunk // nC
    t = tl.arange(0, 256)
    rows = (chunk % nC) * ROWS + t
    ok = heads < H
    bias = tl.zeros_like(heads).to(tl.float32)
    if SOFTPLUS:
        bias = tl.load(dt_bias + heads, mask=ok, other=0.0).to(tl.float32)
    a = _head_decay(A, heads, H, A_IS_LOG)
    out = (chunk * H + heads[None, :]) * 1024 + t[:, None]  # (256, HB)
    keep = ok[None, :] & (t >= 0)[:, None]
    inside = (t < ROWS) & (rows < L)
    for direction in tl.static_range(2):
        source = dtf_in if direction == 0 else dtb_in
        limit = tl.where(t < ROWS, rows, L)  # tokens of the next chunk count as padding
        _, dt = _load_dt(
            source + b * stride_b, limit, heads, stride_l, L, H, bias, DT_MIN, DT_MAX, SOFTPLUS, LIMIT, FAST
        )
        # a term below -200 makes every factor that contains it zero: cut off there, so that sums stay precise
        step = tl.maximum(dt * a[None, :] * 1.4426950408889634, -200.0)  # (256, HB)
        upto = tl.cumsum(step, axis=0, reverse=direction == 1)
        total = tl.sum(step, axis=0)  # (HB,)
        row = upto - step
        column = upto - tl.where(inside[:, None], log2(tl.maximum(dt, DT_TINY), FAST), 0.0)
        tl.store(table + out + 512 * direction, row, mask=keep)
        tl.store(table + out + 512 * direction + 256, column, mask=keep)
        if BOTH:
            tl.store(transposed + out + 512 - 512 * direction, total[None, :] - column, mask=keep)
            tl.store(transposed + out + 768 - 512 * direction, total[None, :] - row, mask=keep)
        tl.store(totals + (chunk * H + heads) * 2 + direction, total, mask=ok)


@triton.jit
def _write_scores(
    B_f, C_f, B_b, C_b, S, ST, chunk, i0, j0, stride_b, stride_l, L, nC,
    TI: tl.constexpr, TJ: tl.constexpr, ROWS: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """Rows i0 .. i0 + TI - 1 and columns j0 .. j0 + TJ - 1 of S, and of S^T where BOTH."""
    base = (chunk // nC) * stride_b
    n = tl.arange(0, 64)
    ti = i0 + tl.arange(0, TI)
    tj = j0 + tl.arange(0, TJ)
    first = (chunk % nC) * ROWS
    i = first + ti
    j = first + tj
    s = tl.zeros((TI, TJ), tl.float32)
    if i0 >= j0:
        r = load_rows(C_f + base, i - 1, n, stride_l, L)
        c = load_cols(B_f + base, j, n, stride_l, L)
        s += tl.where(i[:, None] > j[None, :], tl.dot(r, c), 0.0)
    if i0 <= j0:
        r = load_rows(C_b + base, i + 1, n, stride_l, L)
        c = load_cols(B_b + base, j, n, stride_l, L)
        s += tl.where(i[:, None] < j[None, :], tl.dot(r, c), 0.0)
    # rows of padding would read C beyond their own token: row L pairs C_f[L - 1] with nothing
    s = tl.where((i < L)[:, None] & (j < L)[None, :], s, 0.0).to(S.dtype.element_ty)
    tl.store(S + chunk * (ROWS * ROWS) + ti[:, None] * ROWS + tj[None, :], s)
    if BOTH:
        tl.store(ST + chunk * (ROWS * ROWS) + tj[:, None] * ROWS + ti[None, :], tl.trans(s))


@triton.jit
def chunk_prepare_kernel(
    dtf_in,  # (B, L, H), rows of any stride
    dtb_in,
    dt_bias,  # (H,)
    A,  # (H,)
    B_f,  # (B, L, 64), common strides
    C_f,
    B_b,
    C_b,
    table,  # (B * nC, H, 4, 256) float32 out: exponents for M
    transposed,  # the same for M^T, where BOTH
    totals,  # (B * nC, H, 2) float32 out: of the whole chunk, forward and backward
    S,  # (B * nC, ROWS, ROWS) out
    ST,  # the same transposed, out, where BOTH
    stride_dtb,
    stride_dtl,
    stride_b,
    stride_l,
    L,
    H,
    nC,
    DT_MIN,
    DT_MAX,
    SOFTPLUS: tl.constexpr,
    LIMIT: tl.constexpr,
    A_IS_LOG: tl.constexpr,
    FAST: tl.constexpr,
    BOTH: tl.constexpr,
    HB: tl.constexpr,
    GROUPS: tl.constexpr,  # of HB heads: programs of a chunk for the exponents, before those for the scores
    ROWS: tl.constexpr,
    FULL: tl.constexpr,  # whole tiles of a chunk
    TAIL: tl.constexpr,  # rows and columns beyond them that are computed: 16 or 0
):
    """What the products need of a chunk: the exponents of its heads, and the scores, a tile a program:
    S[i, j] = C_f[i - 1] . B_f[j] below the diagonal, C_b[i + 1] . B_b[j] above it."""
    chunk = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if part < GROUPS:
        heads = part * HB + tl.arange(0, HB)
        _write_exponents(
            dtf_in, dtb_in, dt_bias, A, table, transposed, totals, chunk, heads, stride_dtb, stride_dtl, L, H, nC,
            DT_MIN, DT_MAX, SOFTPLUS, LIMIT, A_IS_LOG, FAST, BOTH, ROWS,
        )  # fmt: skip
    else:
        tile = part - GROUPS
        edge: tl.constexpr = 64 * FULL
        if tile < FULL * FULL:
            _write_scores(
                B_f, C_f, B_b, C_b, S, ST, chunk, tile // FULL * 64, tile % FULL * 64, stride_b, stride_l, L, nC,
                64, 64, ROWS, BOTH,
            )  # fmt: skip
        if TAIL > 0:
            tile -= FULL * FULL
            if (tile >= 0) & (tile < FULL):
                _write_scores(
                    B_f, C_f, B_b, C_b, S, ST, chunk, tile * 64, edge, stride_b, stride_l, L, nC, 64, TAIL, ROWS, BOTH
                )
            tile -= FULL
            if (tile >= 0) & (tile < FULL):
                _write_scores(
                    B_f, C_f, B_b, C_b, S, ST, chunk, edge, tile * 64, stride_b, stride_l, L, nC, TAIL, 64, ROWS, BOTH
                )
            if tile == FULL:
                _write_scores(
                    B_f, C_f, B_b, C_b, S, ST, chunk, edge, edge, stride_b, stride_l, L, nC, TAIL, TAIL, ROWS, BOTH
                )


@triton.jit
def chunk_states_kernel(
    V_f,  # B_f, or C_f for gradients: (B, L, 64)
    V_b,
    U,  # X, or dY for gradients: (B, L, H, 64)
    table,  # (B * nC, H, 4, 256)
    totals,  # (B * nC, H, 2)
    saved,  # gradients: the states of the forward
    states,  # (B, H, 2, nC, 64, 64) out: the state that enters each chunk; for gradients, of the one that leaves it
    through,  # gradients: (B, H, 2, nC) out: entering state . gradient of the leaving one
    stride_vb,
    stride_vl,
    stride_ub,
    stride_ul,
    L,
    H,
    nC,
    GRAD: tl.constexpr,
    NT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """S <- 2^total S + V^T (weights o U), chunk by chunk: forward left to right, backward right to left; gradients
    against their direction."""
    pid = tl.program_id(0)
    direction = pid % 2
    h = (pid // 2) % H
    b = (pid // (2 * H)).to(tl.int64)
    t = tl.arange(0, 64)
    n = tl.arange(0, 64)
    v_ptr = (V_f if direction == 0 else V_b) + b * stride_vb
    u_ptr = U + b * stride_ub + h * 64
    slot = ((b * H + h) * 2 + direction) * nC
    ascending = (direction == 1) if GRAD else (direction == 0)
    shift = tl.where(direction == 0, -1, 1) if GRAD else 0
    state = tl.zeros((64, 64), tl.float32)
    place = n[:, None] * 64 + t[None, :]
    for k in tl.range(0, nC * NT, num_stages=STAGES):
        m = k % NT
        chunk = tl.where(ascending, k // NT, nC - 1 - k // NT)
        tile = tl.where(ascending, m, NT - 1 - m)
        side = ((b * nC + chunk) * H + h) * 1024 + direction * 512
        total = tl.load(totals + ((b * nC + chunk) * H + h) * 2 + direction)
        rows = (chunk * NT + tile) * 64 + t
        u = load_rows(u_ptr, rows, t, stride_ul, L)  # (64, P)
        v = load_cols(v_ptr, rows + shift, n, stride_vl, L)  # (N, 64)
        if GRAD:
            w = tl.load(table + side + tile * 64 + t)
        else:
            w = total - tl.load(table + side + 256 + tile * 64 + t)
        if m == 0:
            here = states + (slot + chunk) * 4096 + place
            tl.store(here, state.to(states.dtype.element_ty))
            if GRAD:
                entering = tl.load(saved + (slot + chunk) * 4096 + place).to(tl.float32)
                tl.store(through + slot + chunk, tl.sum(entering * state) * tl.exp2(total))
            state *= tl.exp2(total)
        wu = (u.to(tl.float32) * tl.exp2(w)[:, None]).to(u.dtype)  # (64, P)
        state = tl.dot(v, wu, state)


@triton.jit
def row_scale_kernel(
    squares,  # (B, H, L)
    rstd,  # (B, L) out
    L,
    H,
    D,
    EPS,
    HB: tl.constexpr,
    T: tl.constexpr,
):
    """1 / sqrt(mean of y^2 over all heads + eps)."""
    b = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * T + tl.arange(0, T)
    h = tl.arange(0, HB)
    v = tl.load(squares + (b * H + h[:, None]) * L + t[None, :], mask=(h < H)[:, None] & (t < L)[None, :], other=0.0)
    tl.store(rstd + b * L + t, tl.rsqrt(tl.sum(v, axis=0) / D + EPS), mask=t < L)


@triton.jit
def chunk_tail_grads_kernel(
    x,  # (B, L, >= H * 64), rows of any stride
    dy,
    S,  # (B * nC, ROWS, ROWS)
    table,  # (B * nC, H, 4, 256)
    row_sums,  # (B * nC, H, NT + 3, 256) out, see score_grads_kernel (hopper_scores.py)
    col_sums,  # (B * nC, H, NT + 1, 256) out
    dS,  # (B * nC, NT, NT, 64, 64) out
    dST,
    stride_xb,
    stride_xl,
    stride_yb,
    stride_yl,
    L,
    H,
    nC,
    NT: tl.constexpr,
    T: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The pairs among the T tokens of a last tile that score_grads_kernel leaves out, a chunk a program."""
    chunk = tl.program_id(0).to(tl.int64)
    b = chunk // nC
    t = tl.arange(0, T)
    p = tl.arange(0, 64)
    first = 64 * (NT - 1)
    rows = (chunk % nC) * (64 * NT) + first + t
    i = t[:, None]
    j = t[None, :]
    s = tl.load(S + (chunk * (64 * NT) + first + i) * (64 * NT) + first + j).to(tl.float32)  # (T, T)
    acc = tl.zeros((T, T), tl.float32)
    for h in tl.range(0, H, num_stages=STAGES):
        y = load_rows(dy + b * stride_yb + h * 64, rows, p, stride_yl, L)  # (T, 64)
        v = load_cols(x + b * stride_xb + h * 64, rows, p, stride_xl, L)  # (64, T)
        e = table + (chunk * H + h) * 1024 + first + t
        left = tl.load(e)[:, None] - tl.load(e + 256)[None, :]
        right = tl.load(e + 512)[:, None] - tl.load(e + 768)[None, :]
        grad = tl.where(i == j, 0.0, tl.dot(y, v) * tl.exp2(tl.where(i > j, left, right)))
        acc += grad
        # the same rounded values in both directions, so that differences of sums do not feel the rounding
        g = (grad * s).to(S.dtype.element_ty).to(tl.float32)
        lower = tl.where(i > j, g, 0.0)
        upper = tl.where(i < j, g, 0.0)
        to = row_sums + (chunk * H + h) * ((NT + 3) * 256) + first + t
        tl.store(to + (NT - 1) * 256, tl.sum(lower, axis=1))
        tl.store(to + NT * 256, tl.sum(upper, axis=1))
        tl.store(to + (NT + 1) * 256, tl.zeros((T,), tl.float32))
        tl.store(to + (NT + 2) * 256, tl.zeros((T,), tl.float32))
        to = col_sums + (chunk * H + h) * ((NT + 1) * 256) + first + t
        tl.store(to + (NT - 1) * 256, tl.sum(lower, axis=0))
        tl.store(to + NT * 256, tl.sum(upper, axis=0))
    at = ((chunk * NT + NT - 1) * NT + NT - 1) * 4096
    tl.store(dS + at + i * 64 + j, acc.to(dS.dtype.element_ty))
    tl.store(dST + at + j * 64 + i, acc.to(dS.dtype.element_ty))


@triton.jit
def chunk_bc_grads_kernel(
    x,  # (B, L, H * 64)
    dy,
    B_f,  # (B, L, 64), common strides
    C_f,
    B_b,
    C_b,
    dS,  # (B * nC, NT, NT, 64, 64)
    dST,
    table,  # (B * nC, H, 4, 256)
    totals,  # (B * nC, H, 2)
    states,  # (B, H, 2, nC, 64, 64), where HAS_STATE
    dstates,
    outer,  # (B * nC, H, 4, 256) out, where HAS_STATE: sums of G with other chunks, of rows (0 forward, 1 backward) and
    # columns (2, 3)
    dB_f,  # (B, L, 64) out, common strides
    dC_f,
    dB_b,
    dC_b,
    stride_xb,
    stride_xl,
    stride_yb,
    stride_yl,
    stride_b,
    stride_l,
    stride_ob,
    stride_ol,
    L,
    H,
    nC,
    NT: tl.constexpr,
    HAS_STATE: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    which = pid % 4  # C_f, C_b, B_f, B_b
    tile = (pid // 4) % NT
    chunk = (pid // (4 * NT)).to(tl.int64)
    b = chunk // nC
    c = chunk % nC
    direction = which % 2
    is_c = which < 2
    t = tl.arange(0, 64)
    n = tl.arange(0, 64)
    first = c * (NT * 64)
    rows = first + tile * 64 + t
    base = b * stride_b
    shift = tl.where(direction == 0, -1, 1)  # a row reads C of its neighbour
    source_shift = tl.where(is_c, 0, shift)
    if is_c:
        block = dS
        if direction == 0:
            source = B_f
            target = dC_f
        else:
            source = B_b
            target = dC_b
    else:
        block = dST
        if direction == 0:
            source = C_f
            target = dB_f
        else:
            source = C_b
            target = dB_b
    block += (chunk * NT + tile) * NT * 4096 + t[:, None] * 64 + t[None, :]
    # C_f and B_b sum over the tiles before this one, C_b and B_f over those after it
    before = (direction == 0) == is_c
    low = tl.where(before, 0, tile)
    high = tl.where(before, tile + 1, NT)
    acc = tl.zeros((64, 64), tl.float32)
    for other in tl.range(low, high, num_stages=STAGES):
        cols = first + other * 64 + t
        inside = (rows < L)[:, None] & (cols < L)[None, :]
        keep = tl.where(before, cols[None, :] < rows[:, None], cols[None, :] > rows[:, None]) & inside
        d = tl.load(block + other * 4096, mask=keep, other=0.0)  # (64, 64)
        v = load_rows(source + base, cols + source_shift, n, stride_l, L)  # (64, N)
        acc = tl.dot(d, v, acc)
    if HAS_STATE:
        # C sums dY over its states, B sums X over the gradients of theirs: the same loop with other operands
        st_all = states
        v_all = dy + b * stride_yb
        stride_v = stride_yl
        plane = direction * 512
        own_ptr = C_f if direction == 0 else C_b
        sign = 1.0
        if not is_c:
            st_all = dstates
            v_all = x + b * stride_xb
            stride_v = stride_xl
            plane = direction * 512 + 256
            own_ptr = B_f if direction == 0 else B_b
            sign = -1.0
        own = load_rows(own_ptr + base, rows + tl.where(is_c, shift, 0), n, stride_l, L)  # (64, N)
        for h in tl.range(0, H, num_stages=STAGES):
            head = chunk * H + h
            st_ptr = st_all + (((b * H + h) * 2 + direction) * nC + c) * 4096
            st = tl.load(st_ptr + t[:, None] + n[None, :] * 64)  # (P, N)
            v = load_rows(v_all + h * 64, rows, t, stride_v, L)  # (64, P)
            e = tl.load(table + head * 1024 + plane + tile * 64 + t)
            total = tl.where(is_c, 0.0, tl.load(totals + head * 2 + direction))
            share = tl.dot(v, st) * tl.exp2(sign * e + total)[:, None]  # (64, N)
            acc += share
            tl.store(outer + (head * 4 + which) * 256 + tile * 64 + t, tl.sum(share * own, axis=1))
    out = target + b * stride_ob + n[None, :]
    to = rows + tl.where(is_c, shift, 0)
    keep_rows = (to >= 0) & (to < L) & (rows < L)
    tl.store(out + to[:, None].to(tl.int64) * stride_ol, acc.to(target.dtype.element_ty), mask=keep_rows[:, None])
    # nothing reads C_f of the last token and C_b of the first
    if is_c:
        unread = L - 1
        if direction == 1:
            unread = 0
        mine = (unread >= first + tile * 64) & (unread < first + tile * 64 + 64)
        if mine:
            nothing = tl.zeros((1, 64), tl.float32).to(target.dtype.element_ty)
            tl.store(out + unread * tl.cast(stride_ol, tl.int64), nothing)


@triton.jit
def chunk_decay_backward_kernel(
    dtf_in,
    dtb_in,
    dt_bias,
    A,
    row_sums,  # (B * nC, H, NT + 3, 256), see score_grads_kernel (hopper_scores.py)
    col_sums,  # (B * nC, H, NT + 1, 256)
    outer,  # (B * nC, H, 4, 256), where HAS_STATE, see chunk_bc_grads_kernel
    through,  # (B, H, 2, nC), where HAS_STATE
    ddtf,  # (B, L, H) out, rows of any stride
    ddtb,
    part,  # (2, B, nC * NT, H) out, float32: gradients of A and of the bias, by tile
    stride_b,
    stride_l,
    stride_gb,
    stride_gl,
    B,
    L,
    H,
    nC,
    DT_MIN,
    DT_MAX,
    SOFTPLUS: tl.constexpr,
    LIMIT: tl.constexpr,
    A_IS_LOG: tl.constexpr,
    FAST: tl.constexpr,
    HAS_STATE: tl.constexpr,
    NT: tl.constexpr,
    HB: tl.constexpr,
):
    """The gradient of the decay of token k is the sum of G over the pairs that k lies between.

    Inside k's tile it is a difference of sums of the same float32 G; all else has terms of one sign of kind: nothing
    cancels, whatever the rounding of the products added up.
    """
    tile = tl.program_id(0) % NT
    chunk = (tl.program_id(0) // NT).to(tl.int64)
    b = chunk // nC
    t = tl.arange(0, 64)
    rows = (chunk % nC) * (NT * 64) + tile * 64 + t
    heads = tl.program_id(1) * HB + tl.arange(0, HB)
    ok = heads < H
    bias = tl.zeros((HB,), tl.float32)
    if SOFTPLUS:
        bias = tl.load(dt_bias + heads, mask=ok, other=0.0).to(tl.float32)
    a = _head_decay(A, heads, H, A_IS_LOG)
    sum_A = tl.zeros((HB,), tl.float32)
    sum_bias = tl.zeros((HB,), tl.float32)
    seen = (rows < L)[:, None] & ok[None, :]  # (64, HB)
    head = chunk * H + heads  # (HB,)
    r_ptr = row_sums + head[None, :] * ((NT + 3) * 256)
    c_ptr = col_sums + head[None, :] * ((NT + 1) * 256)
    o_ptr = outer + head[None, :] * 1024
    first = (chunk % nC) * (NT * 64)
    own = tile * 64 + t
    for direction in tl.static_range(2):
        source = dtf_in if direction == 0 else dtb_in
        target = ddtf if direction == 0 else ddtb
        value, dt = _load_dt(
            source + b * stride_b, rows, heads, stride_l, L, H, bias, DT_MIN, DT_MAX, SOFTPLUS, LIMIT, FAST
        )
        diagonal = tile if direction == 0 else NT
        after = own + 1 if direction == 0 else own - 1  # the query side, one step from the token
        t_after = t + 1 if direction == 0 else t - 1
        has_after = ((t_after >= 0) & (t_after < 64) & (rows - t + t_after < L))[:, None] & ok[None, :]
        inner = tl.load(r_ptr + diagonal * 256 + after[:, None], mask=has_after, other=0.0)  # (64, HB)
        inner += tl.load(r_ptr + (NT + 1 + direction) * 256 + after[:, None], mask=has_after, other=0.0)
        near = tl.load(c_ptr + diagonal * 256 + own[:, None], mask=seen, other=0.0)
        inner -= near
        far = tl.zeros((64, HB), tl.float32)  # columns' sums over rows of other tiles
        beyond = tl.zeros((HB,), tl.float32)  # pairs with the whole tile between them
        for other in tl.static_range(NT):
            earlier = other < tile  # tile ``other`` comes before this one
            if direction == 0:
                is_column = earlier
                is_row = other > tile
            else:
                is_column = other > tile
                is_row = earlier
            inner += tl.load(r_ptr + other * 256 + after[:, None], mask=has_after & is_column, other=0.0)
            far += tl.load(c_ptr + other * 256 + own[:, None], mask=seen & is_row, other=0.0)
            for column in tl.static_range(NT):
                between = is_row & ((column < tile) if direction == 0 else (column > tile))
                i = other * 64 + t
                keep = (first + i < L)[:, None] & ok[None, :] & between
                beyond += tl.sum(tl.load(r_ptr + column * 256 + i[:, None], mask=keep, other=0.0), axis=0)
            if HAS_STATE:
                i = other * 64 + t
                keep = (first + i < L)[:, None] & ok[None, :]
                rows_too = tl.load(o_ptr + direction * 256 + i[:, None], mask=keep & is_row, other=0.0)
                columns_too = tl.load(o_ptr + (2 + direction) * 256 + i[:, None], mask=keep & is_column, other=0.0)
                beyond += tl.sum(rows_too + columns_too, axis=0)
        if HAS_STATE:
            inner += tl.load(o_ptr + direction * 256 + after[:, None], mask=has_after, other=0.0)
            far += tl.load(o_ptr + (2 + direction) * 256 + own[:, None], mask=seen, other=0.0)
            beyond += tl.load(through + ((b * H + heads) * 2 + direction) * nC + chunk % nC, mask=ok, other=0.0)
        da = tl.cumsum(inner, axis=0, reverse=direction == 0)
        da += tl.cumsum(far, axis=0, reverse=direction == 1) - far
        da += beyond[None, :]
        raw = (near + far) / tl.maximum(dt, DT_TINY)
        sum_A += tl.sum(tl.where(seen, da * dt, 0.0), axis=0)
        g = da * a[None, :] + raw
        if LIMIT:
            free = _softplus(value, FAST) if SOFTPLUS else value
            g = tl.where((free >= DT_MIN) & (free <= DT_MAX), g, 0.0)
        if SOFTPLUS:
            g = g * tl.sigmoid(value)
        g = tl.where(seen, g, 0.0)
        sum_bias += tl.sum(g, axis=0)
        where = target + b * stride_gb + rows[:, None].to(tl.int64) * stride_gl + heads[None, :]
        tl.store(where, g.to(target.dtype.element_ty), mask=seen)
    if A_IS_LOG:
        sum_A = sum_A * a
    at = part + (chunk * NT + tile) * H + heads
    tl.store(at, sum_A, mask=ok)
    tl.store(at + tl.cast(B, tl.int64) * nC * NT * H, sum_bias, mask=ok)


@triton.jit
def narrow_kernel(source, target, SIZE, BLOCK: tl.constexpr):
    """A copy in the dtype of ``target``."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + at, mask=at < SIZE, other=0.0)
    tl.store(target + at, value.to(target.dtype.element_ty), mask=at < SIZE)


@triton.jit
def taps_kernel(weight, bias, taps, C, BC: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The convolution's weight (C, 7) and bias as (8, C) float32, a tap a row."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    ok = c < C
    for k in tl.static_range(7):
        tl.store(taps + k * C + c, tl.load(weight + c * 7 + k, mask=ok, other=0.0).to(tl.float32), mask=ok)
    value = tl.zeros((BC,), tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + c, mask=ok, other=0.0).to(tl.float32)
    tl.store(taps + 7 * C + c, value, mask=ok)


@triton.jit
def scale_rows_kernel(
    x,  # (ROWS, D), rows of stride_x
    scale,  # (ROWS,) float32
    out,  # (ROWS, D) contiguous; may be x
    stride_x,
    D,
    DB: tl.constexpr,
):
    """out = x * scale, a factor a row."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DB)
    value = tl.load(x + row * stride_x + d, mask=d < D, other=0.0).to(tl.float32) * tl.load(scale + row)
    tl.store(out + row * D + d, value.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def head_dots_kernel(
    x,  # (B, L, H * 64), rows of any stride
    dy,
    dots,  # (B, L, H) float32 out
    stride_xb,
    stride_xl,
    stride_yb,
    stride_yl,
    L,
    H,
    HB: tl.constexpr,
):
    """Sum over each head of x * dy: the gradient of the diagonal. A token a program."""
    b = tl.program_id(1).to(tl.int64)
    l = tl.program_id(0)
    at = tl.arange(0, HB)[:, None] * 64 + tl.arange(0, 64)[None, :]
    keep = (tl.arange(0, HB) < H)[:, None] & (at >= 0)
    xv = tl.load(x + b * stride_xb + l * stride_xl + at, mask=keep, other=0.0).to(tl.float32)  # (HB, 64)
    yv = tl.load(dy + b * stride_yb + l * stride_yl + at, mask=keep, other=0.0).to(tl.float32)
    h = tl.arange(0, HB)
    tl.store(dots + (b * L + l) * H + h, tl.sum(xv * yv, axis=1), mask=h < H)


HEADS = 8  # most heads a program of the product, whose weights it keeps (hopper_mix.py)
MOST_HEADS = 64  # that fc_D's columns may be in shared memory at once


def in_chunks(
    device: torch.device, dtype: torch.dtype, H: int, P: int, G: int, N: int, d_conv: int = 7, starts: bool = False
) -> bool:
    """Whether a problem runs in whole chunks: on Hopper, in the form of the models; elsewhere in tiles.

    Neither batch nor length decides: an image's bits do not depend on them. Tensors on the meta device are those of a
    recording (offline.py).
    """
    fits = dtype == torch.bfloat16 and P == N == 64 and G == 1 and H <= MOST_HEADS and d_conv == 7 and not starts
    if not fits or device.type not in ('cuda', 'meta') or launch_is_forced() or architecture(device) != 90:
        return False
    return _gluon_is_known()


@cache
def _gluon_is_known() -> bool:
    """Gluon is experimental: a Triton whose Gluon has other names runs the kernels in tiles, and says so once."""
    try:
        from . import hopper_conv, hopper_mix, hopper_scores  # noqa: F401
    except (ImportError, AttributeError) as error:
        text = (
            f'the Gluon of triton {triton.__version__} is not known ({error}): the slower kernels in tiles run instead'
        )
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return False
    return True


def chunks_of(plan: Plan, start: Optional[Tensor] = None, d_conv: int = 7) -> Optional['Chunks']:
    """Sizes, where the problem runs in chunks; None where it runs in tiles with states between them."""
    if not in_chunks(plan.device, plan.dtype, plan.H, plan.P, plan.G, plan.N, d_conv, start is not None):
        return None
    return Chunks(plan.B, plan.L, plan.H, plan.device)


@dataclass(frozen=True)
class Chunks:
    """Sizes of a problem that runs in chunks."""

    B: int
    L: int
    H: int
    device: torch.device
    wide: torch.dtype = torch.bfloat16  # of scores and states

    @property
    def NT(self) -> int:
        """Tiles a chunk: those of the sequence up to 200 tokens, three beyond."""
        return 4 if 192 < self.L <= 200 else min(3, -(-self.L // 64))

    @property
    def full(self) -> int:
        """Whole tiles a chunk."""
        return min(3, self.NT)

    @property
    def tail(self) -> int:
        """Rows and columns of the tile after them that are computed; 0 where there is none."""
        return 16 if self.NT == 4 else 0

    @property
    def rows(self) -> int:
        """Tokens a chunk."""
        return 64 * self.NT

    @property
    def nC(self) -> int:
        """Chunks."""
        return -(-self.L // self.rows)

    @property
    def turns(self) -> int:
        """Heads a program."""
        return next(count for count in range(min(HEADS, self.H), 0, -1) if self.H % count == 0)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uninitialised."""
        return torch.empty(shape, dtype=dtype, device=self.device)


def narrow(t: Tensor) -> Tensor:
    """In bfloat16."""
    if t.dtype == torch.bfloat16:
        return t
    out = torch.empty(t.shape, dtype=torch.bfloat16, device=t.device)
    launch(narrow_kernel, (triton.cdiv(t.numel(), 1024),), t, out, t.numel(), BLOCK=1024, num_warps=4)
    return out


def prepare(
    c: Chunks, bc: tuple[Tensor, ...], source: Any, both: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Exponents for M and, where ``both``, for M^T, (B * nC, H, 4, 256); sums of whole chunks (B * nC, H, 2); S and,
    where ``both``, S^T, (B * nC, rows, rows) in wide: of the tile after the whole ones only the tail."""
    table = c.empty(c.B * c.nC, c.H, 4, 256)
    transposed = torch.empty_like(table) if both else table
    totals = c.empty(c.B * c.nC, c.H, 2)
    S = c.empty(c.B * c.nC, c.rows, c.rows, dtype=c.wide)
    ST = torch.empty_like(S) if both else S
    HB = min(4, triton.next_power_of_2(c.H))
    groups = triton.cdiv(c.H, HB)
    bias = source.A if source.bias is None else source.bias
    launch(chunk_prepare_kernel, (c.B * c.nC, groups + c.NT**2),
        source.dt_f, source.dt_b, bias, source.A, *bc, table, transposed, totals, S, ST,
        source.dt_f.stride(0), source.dt_f.stride(1), bc[0].stride(0), bc[0].stride(1), c.L, c.H, c.nC,
        *source.bounds(), **source.flags(), FAST=fast_math(c.wide, c.device), BOTH=both, HB=HB, GROUPS=groups,
        ROWS=c.rows, FULL=c.full, TAIL=c.tail, num_warps=4, maxnreg=128 if c.tail else 160,
    )  # fmt: skip
    return table, transposed, totals, S, ST


def states(
    c: Chunks, V_f: Tensor, V_b: Tensor, u: Tensor, table: Tensor, totals: Tensor, saved: Optional[Tensor] = None
) -> tuple[Tensor, Optional[Tensor]]:
    """States that enter chunks, (B, H, 2, nC, 64, 64); with those given as ``saved``, the gradients of what leaves."""
    out = c.empty(c.B, c.H, 2, c.nC, 64, 64, dtype=c.wide)
    through = None if saved is None else c.empty(c.B, c.H, 2, c.nC)
    launch(chunk_states_kernel, (c.B * c.H * 2,),
        V_f, V_b, u, table, totals, out if saved is None else saved, out, totals if through is None else through,
        V_f.stride(0), V_f.stride(1), u.stride(0), u.stride(1), c.L, c.H, c.nC,
        GRAD=saved is not None, NT=c.NT, STAGES=3, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out, through


def forward(
    c: Chunks, x: Tensor, bc: tuple[Tensor, ...], source: Any, diag: Optional[Tensor], out: Tensor,
    z: Optional[Tensor] = None, weight: Optional[Tensor] = None,
) -> Optional[Tensor]:  # fmt: skip
    """Writes M x, or with z and weight M x * weight * SiLU(z) and returns the sums over heads of (M x)^2.

    Args:
        x: (B, L, >= H * 64).
        bc: B_f, C_f, B_b, C_b (B, L, 64) with common strides.
        source: Where dt comes from (``DtSource``).
        diag: (B, H, L) or (H,) float32 or None.
        out: (B, L, >= H * 64).
        z: (B, L, >= H * 64).
        weight: (H * 64,).
    """
    from .hopper_mix import mix_chunks

    table, _, totals, S, _ = prepare(c, bc, source, both=False)
    entering = states(c, bc[0], bc[2], x, table, totals)[0] if c.nC > 1 else None
    squares = None if z is None else c.empty(c.B, c.H, c.L)
    gate = None if z is None else (z, weight, squares)
    mix_chunks(c, x, out, S, table, diag, entering, (bc[1], bc[3]), gate=gate)
    return squares


def row_scale(c: Chunks, squares: Tensor, width: int, eps: float) -> Tensor:
    """(B, L) float32: 1 / sqrt(mean square + eps)."""
    rstd = c.empty(c.B, c.L)
    launch(row_scale_kernel, (c.B, triton.cdiv(c.L, 64)),
        squares, rstd, c.L, c.H, width, eps, HB=triton.next_power_of_2(c.H), T=64, num_warps=4,
    )  # fmt: skip
    return rstd


def scale_rows(x: Tensor, scale: Tensor, out: Tensor) -> None:
    """out (..., D) contiguous = x (..., D) with rows of one stride, times scale (...) float32."""
    D = x.shape[-1]
    launch(scale_rows_kernel, (scale.numel(),),
        x, scale, out, x.stride(-2), D, DB=triton.next_power_of_2(D), num_warps=4 if D <= 2048 else 8,
    )  # fmt: skip


def head_dots(c: Chunks, x: Tensor, dy: Tensor) -> Tensor:
    """(B, L, H) float32: sums over the heads of x * dy, both (B, L, >= H * 64)."""
    dots = c.empty(c.B, c.L, c.H)
    launch(head_dots_kernel, (c.L, c.B),
        x, dy, dots, x.stride(0), x.stride(1), dy.stride(0), dy.stride(1), c.L, c.H,
        HB=triton.next_power_of_2(c.H), num_warps=4,
    )  # fmt: skip
    return dots


def taps(weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """The convolution's weight (C, 1, 7) and bias (C,) as (8, C) float32, a tap a row."""
    C = weight.shape[0]
    out = torch.empty(8, C, dtype=torch.float32, device=weight.device)
    launch(taps_kernel, (triton.cdiv(C, 256),),
        weight, weight if bias is None else bias, out, C, BC=256, HAS_BIAS=bias is not None, num_warps=4,
    )  # fmt: skip
    return out


@dataclass
class ChunkSums:
    """What the backward of the decays needs, see the kernels."""

    rows: Tensor
    cols: Tensor
    outer: Optional[Tensor]
    through: Optional[Tensor]


def backward(
    c: Chunks, x: Tensor, bc: tuple[Tensor, ...], source: Any, diag: Optional[Tensor], dy: Tensor, dx: Tensor,
    dbc: tuple[Tensor, ...], fc: Optional[Tensor] = None, ddiag: Optional[Tensor] = None,
) -> ChunkSums:  # fmt: skip
    """Writes dx, dbc = dB_f, dC_f, dB_b, dC_b (common strides). With fc (H, H * 64), dx has ddiag (B, L, H) fc."""
    from .hopper_mix import mix_chunks
    from .hopper_scores import score_grads

    B_f, C_f, B_b, C_b = bc
    table, transposed, totals, S, ST = prepare(c, bc, source, both=True)
    entering = leaving = through = None
    if c.nC > 1:
        entering, _ = states(c, B_f, B_b, x, table, totals)
        leaving, through = states(c, C_f, C_b, dy, table, totals, entering)
    diagonal = None if fc is None else (narrow(fc), ddiag)
    mix_chunks(c, dy, dx, ST, transposed, diag, leaving, (B_b, B_f), transposed=True, diagonal=diagonal)
    sums = [c.empty(c.B * c.nC, c.H, c.NT + planes, 256) for planes in (3, 1)]
    dS, dST = (c.empty(c.B * c.nC, c.NT, c.NT, 64, 64, dtype=c.wide) for _ in range(2))
    strides = (x.stride(0), x.stride(1), dy.stride(0), dy.stride(1))
    score_grads(c, x, dy, S, ST, table, *sums, dS, dST)
    if c.tail:
        launch(chunk_tail_grads_kernel, (c.B * c.nC,),
            x, dy, S, table, *sums, dS, dST, *strides, c.L, c.H, c.nC,
            NT=c.NT, T=c.tail, STAGES=3, num_warps=1, num_stages=3,
        )  # fmt: skip
    outer = None if entering is None else c.empty(c.B * c.nC, c.H, 4, 256)
    unused = totals
    stages = 2 if entering is None else 4
    launch(chunk_bc_grads_kernel, (4 * c.NT * c.B * c.nC,),
        x, dy, *bc, dS, dST, table, totals, unused if entering is None else entering,
        unused if leaving is None else leaving, unused if outer is None else outer, *dbc, *strides,
        B_f.stride(0), B_f.stride(1), dbc[0].stride(0), dbc[0].stride(1), c.L, c.H, c.nC,
        NT=c.NT, HAS_STATE=entering is not None, STAGES=stages, num_warps=4, num_stages=stages,
    )  # fmt: skip
    return ChunkSums(*sums, outer, through)


def decays_backward(c: Chunks, source: Any, g: ChunkSums, ddtf: Tensor, ddtb: Tensor) -> Tensor:
    """Writes the gradients of both dt views (common strides).

    Returns:
        (2, B, tiles, H) float32: shares of the gradients of A (or A_log) and of the bias, to be summed.
    """
    HB = min(8, max(4, triton.next_power_of_2(c.H)))
    part = c.empty(2, c.B, c.nC * c.NT, c.H)
    bias = source.A if source.bias is None else source.bias
    launch(chunk_decay_backward_kernel, (c.B * c.nC * c.NT, triton.cdiv(c.H, HB)),
        source.dt_f, source.dt_b, bias, source.A, g.rows, g.cols, g.rows if g.outer is None else g.outer,
        g.rows if g.through is None else g.through, ddtf, ddtb, part, source.dt_f.stride(0), source.dt_f.stride(1),
        ddtf.stride(0), ddtf.stride(1), c.B, c.L, c.H, c.nC, *source.bounds(), **source.flags(),
        FAST=fast_math(c.wide, c.device), HAS_STATE=g.outer is not None, NT=c.NT, HB=HB, num_warps=8,
    )  # fmt: skip
    return part
