"""States that travel between tiles, and their gradients: one program a (batch, head, direction), tiles in scan order.

States at the ends that nothing enters are neither stored nor summed.

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
    cf,  # (B, H, Lp): lf - log2(dt)
    cb,
    start,  # (H, P, N) float32 or None
    states,  # (B, H, 2, nT, N, P): out, the state that enters each tile; for gradients the saved states (in)
    out,  # gradients: (B, H, 2, nT, N, P), of the state that leaves each tile
    through,  # gradients: (B, H, 2, nT) what crosses the whole tile: entering state . gradient of the leaving one
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
    nT,
    N: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    GRAD: tl.constexpr,
    HAS_START: tl.constexpr,
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
    c_ptr = (cf if direction == 0 else cb) + (b * H + h) * Lp
    slot = ((b * H + h) * 2 + direction) * nT
    ascending = direction == 0
    if GRAD:
        ascending = direction == 1
    tile_np = n[:, None] * P + p[None, :]  # (N, P)
    state = tl.zeros((N, P), tl.float32)
    if HAS_START and not GRAD:
        state = tl.load(start + h * (P * N) + p[None, :] * N + n[:, None]).to(tl.float32)
    side = tl.where(direction == 0, T - 1, 0)
    step = tl.where(ascending, 1, -1)
    begin = tl.where(ascending, 0, nT - 1)
    if GRAD:
        tl.store(through + slot + begin, 0.0)
    if HAS_START and not GRAD:
        tl.store(states + (slot + begin) * (N * P) + tile_np, state.to(states.dtype.element_ty))
    steps = nT - 1
    if HAS_START and GRAD:
        steps = nT
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
            e = total - tl.load(c_ptr + rows)
        wu = (u.to(tl.float32) * tl.exp2(e.to(tl.float32))[:, None]).to(u.dtype)  # (T, P)
        state = tl.dot(v, wu, state * tl.exp2(total.to(tl.float32)), input_precision=PREC)
        next_tile = tile + step
        inside = (next_tile + 0 * n >= 0) & (next_tile + 0 * n < nT)  # (N,)
        here = (slot + next_tile) * (N * P) + tile_np
        if GRAD:
            stored = inside
            if not HAS_START:  # no state enters where this scan ends
                stored = inside & (k + 0 * n < nT - 2)
            saved = tl.load(states + here, mask=stored[:, None], other=0.0).to(tl.float32)  # (N, P)
            if k < nT - 1:
                span = tl.load(l_ptr + next_tile * T + side)
                tl.store(through + slot + next_tile, tl.sum(saved * state) * tl.exp2(span.to(tl.float32)))
            tl.store(out + here, state.to(out.dtype.element_ty), mask=inside[:, None])
        else:
            tl.store(states + here, state.to(states.dtype.element_ty), mask=inside[:, None])
    if GRAD and HAS_START:
        tl.store(dstart + ((b * H + h) * 2 + direction) * (N * P) + tile_np, state)
