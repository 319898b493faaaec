"""States that travel between chunks, and their gradients: one program a (batch, head, direction), chunks in scan order.

Forward direction:   S <- exp2(tile sum) S + B_f^T diag(decay to the tile's end * dt) X, left to right.
Backward direction:  the mirror image, right to left.
Gradients run against their direction, with C (shifted) and dY instead of B and X.
"""

import triton
import triton.language as tl

from .scores import load_cols, load_rows


@triton.jit
def states_kernel(
    V_f,  # B_f, or C_f for gradients: (B, L, G, N)
    V_b,
    U,  # X, or dY for gradients: (B, L, H, P)
    lf,  # (B, H, Lp)
    lb,
    dtf,  # (B, H, Lp): dt, or, where FLAT, lf - log2(dt)
    dtb,
    start,  # (H, P, N) float32 or None
    states,  # (B, H, 2, nC, N, P): out, the state that enters each chunk; for gradients the saved states (in)
    out,  # gradients: (B, H, 2, nC, N, P), of the state that leaves each chunk
    through,  # gradients: (B, H, 2, nC) what crosses the whole chunk: entering state . gradient of the leaving one
    dstart,  # gradients: (B, H, 2, N, P) of the start state
    stride_vb,
    stride_vl,
    stride_vg,
    stride_ub,
    stride_ul,
    stride_uh,
    L,
    H,
    G,
    Lp,
    nC,
    QT,
    N: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    GRAD: tl.constexpr,
    HAS_START: tl.constexpr,
    FLAT: tl.constexpr,  # chunks of one tile: states at the ends that nothing enters are neither stored nor summed
    PREC: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    direction = pid % 2
    h = (pid // 2) % H
    b = (pid // (2 * H)).to(tl.int64)
    t = tl.arange(0, T)
    n = tl.arange(0, N)
    p = tl.arange(0, P)
    g = h // (H // G)
    v_ptr = (V_f if direction == 0 else V_b) + b * stride_vb + g * stride_vg
    u_ptr = U + b * stride_ub + h * stride_uh
    l_ptr = (lf if direction == 0 else lb) + (b * H + h) * Lp
    dt_ptr = (dtf if direction == 0 else dtb) + (b * H + h) * Lp
    slot = ((b * H + h) * 2 + direction) * nC
    ascending = direction == 0
    if GRAD:
        ascending = direction == 1
    tile_np = n[:, None] * P + p[None, :]  # (N, P)
    state = tl.zeros((N, P), tl.float32)
    if HAS_START and not GRAD:
        state = tl.load(start + h * (P * N) + p[None, :] * N + n[:, None]).to(tl.float32)
    if FLAT:
        side = tl.where(direction == 0, T - 1, 0)
        step = tl.where(ascending, 1, -1)
        begin = tl.where(ascending, 0, nC - 1)
        if GRAD:
            tl.store(through + slot + begin, 0.0)
        if HAS_START and not GRAD:
            tl.store(states + (slot + begin) * (N * P) + tile_np, state.to(states.dtype.element_ty))
        steps = nC - 1
        if HAS_START and GRAD:
            steps = nC
        for k in tl.range(0, steps, num_stages=STAGES):
            tile = begin + step * k
            rows = tile * T + t
            u = load_rows(u_ptr, rows, p, stride_ul, L)  # (T, P)
            total = tl.load(l_ptr + tile * T + side)
            if GRAD:
                near = t + tl.where(direction == 0, -1, 1)
                v = load_cols(v_ptr, tile * T + near, n, stride_vl, L)  # (N, T)
                e = tl.load(l_ptr + tile * T + near, mask=(near >= 0) & (near < T), other=0.0)
            else:
                v = load_cols(v_ptr, rows, n, stride_vl, L)  # (N, T)
                e = total - tl.load(dt_ptr + rows)  # here dt_ptr holds lf - log2(dt)
            wu = (u.to(tl.float32) * tl.exp2(e.to(tl.float32))[:, None]).to(u.dtype)  # (T, P)
            state = tl.dot(v, wu, state * tl.exp2(total.to(tl.float32)), input_precision=PREC)
            next_tile = tile + step
            inside = (next_tile + 0 * n >= 0) & (next_tile + 0 * n < nC)  # (N,)
            here = (slot + next_tile) * (N * P) + tile_np
            if GRAD:
                stored = inside
                if not HAS_START:  # no state enters where this scan ends
                    stored = inside & (k + 0 * n < nC - 2)
                saved = tl.load(states + here, mask=stored[:, None], other=0.0).to(tl.float32)  # (N, P)
                if k < nC - 1:
                    span = tl.load(l_ptr + next_tile * T + side)
                    tl.store(through + slot + next_tile, tl.sum(saved * state) * tl.exp2(span.to(tl.float32)))
                tl.store(out + here, state.to(out.dtype.element_ty), mask=inside[:, None])
            else:
                tl.store(states + here, state.to(states.dtype.element_ty), mask=inside[:, None])
    else:
        for k in tl.range(0, nC * QT, num_stages=STAGES):
            m = k % QT
            chunk = tl.where(ascending, k // QT, nC - 1 - k // QT)
            tile = chunk * QT + tl.where(ascending, m, QT - 1 - m)
            if m == 0:
                here = (slot + chunk) * (N * P)
                if GRAD:
                    span = tl.zeros((), lf.dtype.element_ty)
                    for inner in range(QT):
                        span += tl.load(l_ptr + (chunk * QT + inner) * T + tl.where(direction == 0, T - 1, 0))
                    saved = tl.load(states + here + tile_np).to(tl.float32)  # (N, P)
                    tl.store(through + slot + chunk, tl.sum(saved * state) * tl.exp2(span.to(tl.float32)))
                    tl.store(out + here + tile_np, state.to(out.dtype.element_ty))
                else:
                    tl.store(states + here + tile_np, state.to(states.dtype.element_ty))
            rows = tile * T + t
            u = load_rows(u_ptr, rows, p, stride_ul, L)  # (T, P)
            total = tl.load(l_ptr + tile * T + tl.where(direction == 0, T - 1, 0))
            if GRAD:
                shift = tl.where(direction == 0, -1, 1)
                v = load_cols(v_ptr, rows + shift, n, stride_vl, L)  # (N, T)
                near = t + shift
                w = tl.exp2(tl.load(l_ptr + tile * T + near, mask=(near >= 0) & (near < T), other=0.0).to(tl.float32))
            else:
                v = load_cols(v_ptr, rows, n, stride_vl, L)  # (N, T)
                w = tl.exp2((total - tl.load(l_ptr + rows)).to(tl.float32)) * tl.load(dt_ptr + rows)  # (T,)
            wu = (u.to(tl.float32) * w[:, None]).to(u.dtype)  # (T, P)
            state = tl.dot(v, wu, state * tl.exp2(total.to(tl.float32)), input_precision=PREC)
    if GRAD and HAS_START:
        tl.store(dstart + ((b * H + h) * 2 + direction) * (N * P) + tile_np, state)
