"""Depthwise same-padded convolution + SiLU over [x, B, C], the diagonal fc_D(x) + D, and the convolution's backward.

Seven taps (every released model) walk down the sequence with a window of rows in registers: each row is read once and
nothing is recomputed. Other widths use one tile a program and shifted loads. Backward fuses the activation's gradient,
the transposed convolution and the weight's gradient, so that the intermediate never leaves the registers.
"""

import triton
import triton.language as tl


@triton.jit
def _silu_gradient(pre):
    sig = tl.sigmoid(pre)
    return sig * (1.0 + pre * (1.0 - sig))


@triton.jit
def _row(ptr, row, stride, cols, ok, L, ALIGN: tl.constexpr):
    """(BC,) one row of channels, zero outside the sequence."""
    start = tl.multiple_of(row * tl.cast(stride, tl.int64), ALIGN)
    here = row + tl.zeros_like(cols)  # (BC,), so that the mask is a tensor of booleans in the interpreter too
    return tl.load(ptr + start + cols, mask=ok & (here >= 0) & (here < L), other=0.0)


@triton.jit
def _tap7(x0, x1, x2, x3, x4, x5, x6, w0, w1, w2, w3, w4, w5, w6):
    return x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3 + x4 * w4 + x5 * w5 + x6 * w6


@triton.jit
def conv7_kernel(
    u,  # (B, L, C) rows of any stride: x, B, C before the convolution
    w,  # (C, 7)
    bias,  # (C,)
    out,  # (B, L, C) contiguous
    stride_b,
    stride_l,
    L,
    C,
    SEGMENT,  # tokens a program, a multiple of 4
    BC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    blocks = tl.cdiv(C, BC)
    segments = tl.cdiv(L, SEGMENT)
    block = tl.program_id(0) % blocks
    segment = (tl.program_id(0) // blocks) % segments
    b = (tl.program_id(0) // (blocks * segments)).to(tl.int64)
    cols = block * BC + tl.arange(0, BC)
    ok = cols < C
    u_b = u + b * stride_b
    o_b = out + b * L * C + cols
    w0 = tl.load(w + cols * 7, mask=ok, other=0.0).to(tl.float32)  # (BC,)
    w1 = tl.load(w + cols * 7 + 1, mask=ok, other=0.0).to(tl.float32)
    w2 = tl.load(w + cols * 7 + 2, mask=ok, other=0.0).to(tl.float32)
    w3 = tl.load(w + cols * 7 + 3, mask=ok, other=0.0).to(tl.float32)
    w4 = tl.load(w + cols * 7 + 4, mask=ok, other=0.0).to(tl.float32)
    w5 = tl.load(w + cols * 7 + 5, mask=ok, other=0.0).to(tl.float32)
    w6 = tl.load(w + cols * 7 + 6, mask=ok, other=0.0).to(tl.float32)
    bv = tl.zeros((BC,), tl.float32)
    if HAS_BIAS:
        bv += tl.load(bias + cols, mask=ok, other=0.0).to(tl.float32)
    start = segment * SEGMENT
    stop = tl.minimum(start + SEGMENT, L)
    x0 = _row(u_b, start - 3, stride_l, cols, ok, L, ALIGN).to(tl.float32)  # (BC,)
    x1 = _row(u_b, start - 2, stride_l, cols, ok, L, ALIGN).to(tl.float32)
    x2 = _row(u_b, start - 1, stride_l, cols, ok, L, ALIGN).to(tl.float32)
    x3 = _row(u_b, start, stride_l, cols, ok, L, ALIGN).to(tl.float32)
    x4 = _row(u_b, start + 1, stride_l, cols, ok, L, ALIGN).to(tl.float32)
    x5 = _row(u_b, start + 2, stride_l, cols, ok, L, ALIGN).to(tl.float32)
    n0 = _row(u_b, start + 3, stride_l, cols, ok, L, ALIGN)
    n1 = _row(u_b, start + 4, stride_l, cols, ok, L, ALIGN)
    n2 = _row(u_b, start + 5, stride_l, cols, ok, L, ALIGN)
    n3 = _row(u_b, start + 6, stride_l, cols, ok, L, ALIGN)
    for t in range(start, stop, 4):
        a0 = n0.to(tl.float32)
        a1 = n1.to(tl.float32)
        a2 = n2.to(tl.float32)
        a3 = n3.to(tl.float32)
        # the next four rows are on their way while these are used
        n0 = _row(u_b, t + 7, stride_l, cols, ok, L, ALIGN)
        n1 = _row(u_b, t + 8, stride_l, cols, ok, L, ALIGN)
        n2 = _row(u_b, t + 9, stride_l, cols, ok, L, ALIGN)
        n3 = _row(u_b, t + 10, stride_l, cols, ok, L, ALIGN)
        p0 = bv + _tap7(x0, x1, x2, x3, x4, x5, a0, w0, w1, w2, w3, w4, w5, w6)
        p1 = bv + _tap7(x1, x2, x3, x4, x5, a0, a1, w0, w1, w2, w3, w4, w5, w6)
        p2 = bv + _tap7(x2, x3, x4, x5, a0, a1, a2, w0, w1, w2, w3, w4, w5, w6)
        p3 = bv + _tap7(x3, x4, x5, a0, a1, a2, a3, w0, w1, w2, w3, w4, w5, w6)
        at = o_b + t * tl.cast(C, tl.int64)
        here = t + tl.zeros_like(cols)
        tl.store(at, (p0 * tl.sigmoid(p0)).to(out.dtype.element_ty), mask=ok)
        tl.store(at + C, (p1 * tl.sigmoid(p1)).to(out.dtype.element_ty), mask=ok & (here + 1 < stop))
        tl.store(at + 2 * C, (p2 * tl.sigmoid(p2)).to(out.dtype.element_ty), mask=ok & (here + 2 < stop))
        tl.store(at + 3 * C, (p3 * tl.sigmoid(p3)).to(out.dtype.element_ty), mask=ok & (here + 3 < stop))
        x0 = x4
        x1 = x5
        x2 = a0
        x3 = a1
        x4 = a2
        x5 = a3


@triton.jit
def conv_kernel(
    u,  # (B, L, C) rows of any stride
    w,  # (C, K)
    bias,  # (C,)
    out,  # (B, L, C) contiguous
    segments,  # (L,) the sequence of each token, where PACKED
    stride_b,
    stride_l,
    L,
    C,
    K: tl.constexpr,
    TL: tl.constexpr,
    BC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALIGN: tl.constexpr,
    PACKED: tl.constexpr,
):
    blocks = tl.cdiv(C, BC)
    tiles = tl.cdiv(L, TL)
    b = (tl.program_id(0) // (blocks * tiles)).to(tl.int64)
    rows = ((tl.program_id(0) // blocks) % tiles) * TL + tl.arange(0, TL)
    cols = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    base = u + b * stride_b
    pre = _convolve(base, w, bias, segments, rows, cols, stride_l, L, C, K, HAS_BIAS, ALIGN, PACKED)  # (TL, BC)
    at = out + (b * L + rows[:, None]) * C + cols[None, :]
    tl.store(at, (pre * tl.sigmoid(pre)).to(out.dtype.element_ty), mask=(rows < L)[:, None] & (cols < C)[None, :])


@triton.jit
def _seen(segments, rows, near, L, PACKED: tl.constexpr):
    """(TL,) Whether ``near`` is a token of the sequence that the token ``rows`` belongs to."""
    inside = (near >= 0) & (near < L)
    if PACKED:
        inside &= rows < L
        here = tl.load(segments + rows, mask=inside, other=0)
        inside &= here == tl.load(segments + near, mask=inside, other=0)
    return inside


@triton.jit
def _convolve(
    u, w, bias, segments, rows, cols, stride_l, L, C,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, ALIGN: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """(TL, BC) float32: the convolution before its activation."""
    ok = cols < C
    acc = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=ok, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(K):
        near = rows + (k - K // 2)
        mask = _seen(segments, rows, near, L, PACKED)[:, None] & ok[None, :]
        start = tl.multiple_of(near.to(tl.int64) * stride_l, ALIGN)  # (TL,)
        v = tl.load(u + start[:, None] + cols[None, :], mask=mask, other=0.0)  # (TL, BC)
        acc += v.to(tl.float32) * tl.load(w + cols * K + k, mask=ok, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def diagonal_kernel(
    x,  # (B, L, >= d_inner) rows of stride_l: x after the activation
    fc,  # (H, d_inner)
    D,  # (H,)
    diag,  # (B, H, L) float32, out
    stride_b,
    stride_l,
    L,
    INNER,
    H,
    HB: tl.constexpr,
    TL: tl.constexpr,
    BC: tl.constexpr,
    PREC: tl.constexpr,
):
    tiles = tl.cdiv(L, TL)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.program_id(0) % tiles) * TL + tl.arange(0, TL)
    heads = tl.program_id(1) * HB + tl.arange(0, HB)
    c = tl.arange(0, BC)
    acc = tl.zeros((TL, HB), tl.float32)
    x_row = x + b * stride_b + rows[:, None].to(tl.int64) * stride_l + c[None, :]
    fc_row = fc + heads[None, :] * INNER + c[:, None]
    for start in range(0, INNER, BC):
        v = tl.load(x_row + start, mask=(rows < L)[:, None] & (start + c < INNER)[None, :], other=0.0)  # (TL, BC)
        f = tl.load(fc_row + start, mask=(heads < H)[None, :] & (start + c < INNER)[:, None], other=0.0)  # (BC, HB)
        acc = tl.dot(v, f.to(v.dtype), acc, input_precision=PREC)
    acc += tl.load(D + heads, mask=heads < H, other=0.0).to(tl.float32)[None, :]
    at = diag + (b * H + heads[None, :]) * L + rows[:, None]
    tl.store(at, acc, mask=(rows < L)[:, None] & (heads < H)[None, :])


@triton.jit
def conv7_backward_kernel(
    u,  # (B, L, C) rows of any stride
    w,  # (C, 7)
    bias,  # (C,)
    g,  # (B, L, C) contiguous: gradient after the activation
    du,  # (B, L, C) rows of any stride, out
    part,  # (B, segments, 8, C) float32, out: weight and bias gradients of the segment
    stride_b,
    stride_l,
    stride_db,
    stride_dl,
    L,
    C,
    SEGMENT,
    BC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_D: tl.constexpr,
):
    blocks = tl.cdiv(C, BC)
    segments = tl.cdiv(L, SEGMENT)
    block = tl.program_id(0) % blocks
    segment = (tl.program_id(0) // blocks) % segments
    b = (tl.program_id(0) // (blocks * segments)).to(tl.int64)
    cols = block * BC + tl.arange(0, BC)
    ok = cols < C
    u_b = u + b * stride_b
    g_b = g + b * L * C
    d_b = du + b * stride_db + cols
    w0 = tl.load(w + cols * 7, mask=ok, other=0.0).to(tl.float32)  # (BC,)
    w1 = tl.load(w + cols * 7 + 1, mask=ok, other=0.0).to(tl.float32)
    w2 = tl.load(w + cols * 7 + 2, mask=ok, other=0.0).to(tl.float32)
    w3 = tl.load(w + cols * 7 + 3, mask=ok, other=0.0).to(tl.float32)
    w4 = tl.load(w + cols * 7 + 4, mask=ok, other=0.0).to(tl.float32)
    w5 = tl.load(w + cols * 7 + 5, mask=ok, other=0.0).to(tl.float32)
    w6 = tl.load(w + cols * 7 + 6, mask=ok, other=0.0).to(tl.float32)
    bv = tl.zeros((BC,), tl.float32)
    if HAS_BIAS:
        bv += tl.load(bias + cols, mask=ok, other=0.0).to(tl.float32)
    start = segment * SEGMENT
    stop = tl.minimum(start + SEGMENT, L)
    first = start - 3
    x0 = _row(u_b, first - 3, stride_l, cols, ok, L, ALIGN).to(tl.float32)  # (BC,) rows t-3 .. t+2
    x1 = _row(u_b, first - 2, stride_l, cols, ok, L, ALIGN).to(tl.float32)
    x2 = _row(u_b, first - 1, stride_l, cols, ok, L, ALIGN).to(tl.float32)
    x3 = _row(u_b, first, stride_l, cols, ok, L, ALIGN).to(tl.float32)
    x4 = _row(u_b, first + 1, stride_l, cols, ok, L, ALIGN).to(tl.float32)
    x5 = _row(u_b, first + 2, stride_l, cols, ok, L, ALIGN).to(tl.float32)
    # Gradients before the activation of rows t-1 .. t-6. Triton 3.6 takes loop variables that start as one value and
    # are handed on from one to the next for constants: they start as different values (in lanes never stored).
    zero = tl.zeros((BC,), tl.float32)
    d1 = tl.where(ok, 0.0, 1.0)  # (BC,)
    d2 = tl.where(ok, 0.0, 2.0)
    d3 = tl.where(ok, 0.0, 3.0)
    d4 = tl.where(ok, 0.0, 4.0)
    d5 = tl.where(ok, 0.0, 5.0)
    d6 = tl.where(ok, 0.0, 6.0)
    s0 = zero
    s1 = zero
    s2 = zero
    s3 = zero
    s4 = zero
    s5 = zero
    s6 = zero
    sb = zero
    n0 = _row(u_b, first + 3, stride_l, cols, ok, L, ALIGN)
    n1 = _row(u_b, first + 4, stride_l, cols, ok, L, ALIGN)
    n2 = _row(u_b, first + 5, stride_l, cols, ok, L, ALIGN)
    n3 = _row(u_b, first + 6, stride_l, cols, ok, L, ALIGN)
    m0 = _row(g_b, first, C, cols, ok, L, 1)
    m1 = _row(g_b, first + 1, C, cols, ok, L, 1)
    m2 = _row(g_b, first + 2, C, cols, ok, L, 1)
    m3 = _row(g_b, first + 3, C, cols, ok, L, 1)
    for start_t in range(first, stop + 3, 7):
        for step in tl.static_range(7):  # seven steps bring every row of the window back to its own register
            t = start_t + step
            x6 = n0.to(tl.float32)
            grad = m0.to(tl.float32)
            n0 = n1
            n1 = n2
            n2 = n3
            m0 = m1
            m1 = m2
            m2 = m3
            # four rows ahead are on their way
            n3 = _row(u_b, t + 7, stride_l, cols, ok, L, ALIGN)
            m3 = _row(g_b, t + 4, C, cols, ok, L, 1)
            pre = bv + _tap7(x0, x1, x2, x3, x4, x5, x6, w0, w1, w2, w3, w4, w5, w6)
            d0 = grad * _silu_gradient(pre)
            back = _tap7(d0, d1, d2, d3, d4, d5, d6, w0, w1, w2, w3, w4, w5, w6)  # row t-3
            here = t + tl.zeros_like(cols)
            to = tl.multiple_of((t - 3) * tl.cast(stride_dl, tl.int64), ALIGN_D)
            tl.store(d_b + to, back.to(du.dtype.element_ty), mask=ok & (here - 3 >= start) & (here - 3 < stop))
            own = tl.where((here >= start) & (here < stop), d0, 0.0)
            s0 += own * x0
            s1 += own * x1
            s2 += own * x2
            s3 += own * x3
            s4 += own * x4
            s5 += own * x5
            s6 += own * x6
            sb += own
            x0 = x1
            x1 = x2
            x2 = x3
            x3 = x4
            x4 = x5
            x5 = x6
            d6 = d5
            d5 = d4
            d4 = d3
            d3 = d2
            d2 = d1
            d1 = d0
    slot = part + (b * segments + segment) * 8 * C + cols
    tl.store(slot, s0, mask=ok)
    tl.store(slot + C, s1, mask=ok)
    tl.store(slot + 2 * C, s2, mask=ok)
    tl.store(slot + 3 * C, s3, mask=ok)
    tl.store(slot + 4 * C, s4, mask=ok)
    tl.store(slot + 5 * C, s5, mask=ok)
    tl.store(slot + 6 * C, s6, mask=ok)
    tl.store(slot + 7 * C, sb, mask=ok)


@triton.jit
def conv_activation_backward_kernel(
    u,  # (B, L, C) rows of any stride
    w,  # (C, K)
    bias,  # (C,)
    g,  # (B, L, C) contiguous: in, gradient after the activation; out, before it
    segments,  # (L,), where PACKED
    stride_b,
    stride_l,
    L,
    C,
    K: tl.constexpr,
    TL: tl.constexpr,
    BC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALIGN: tl.constexpr,
    PACKED: tl.constexpr,
):
    blocks = tl.cdiv(C, BC)
    tiles = tl.cdiv(L, TL)
    b = (tl.program_id(0) // (blocks * tiles)).to(tl.int64)
    rows = ((tl.program_id(0) // blocks) % tiles) * TL + tl.arange(0, TL)
    cols = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    base = u + b * stride_b
    pre = _convolve(base, w, bias, segments, rows, cols, stride_l, L, C, K, HAS_BIAS, ALIGN, PACKED)  # (TL, BC)
    at = g + (b * L + rows[:, None]) * C + cols[None, :]
    keep = (rows < L)[:, None] & (cols < C)[None, :]
    grad = tl.load(at, mask=keep, other=0.0).to(tl.float32) * _silu_gradient(pre)
    tl.store(at, grad.to(g.dtype.element_ty), mask=keep)


@triton.jit
def conv_backward_kernel(
    u,  # (B, L, C) rows of any stride
    w,
    g,  # (B, L, C) contiguous: gradient before the activation
    du,  # (B, L, C) rows of any stride, out
    part,  # (B, tiles, K + 1, C) float32, out: weight and bias gradients of the tile
    segments,  # (L,), where PACKED
    stride_b,
    stride_l,
    stride_db,
    stride_dl,
    L,
    C,
    K: tl.constexpr,
    TL: tl.constexpr,
    BC: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_D: tl.constexpr,
    PACKED: tl.constexpr,
):
    tiles = tl.cdiv(L, TL)
    blocks = tl.cdiv(C, BC)
    tile = (tl.program_id(0) // blocks) % tiles
    b = (tl.program_id(0) // (blocks * tiles)).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    ok = cols < C
    u_b = u + b * stride_b
    g_b = g + b * L * C
    slot = part + (b * tiles + tile) * (K + 1) * C + cols
    rows = tile * TL + tl.arange(0, TL)
    here = (rows < L)[:, None] & ok[None, :]
    gv = tl.load(g_b + rows[:, None].to(tl.int64) * C + cols[None, :], mask=here, other=0.0).to(tl.float32)  # (TL, BC)
    acc = tl.zeros((TL, BC), tl.float32)
    for k in tl.static_range(K):
        near = rows + (k - K // 2)
        mask = _seen(segments, rows, near, L, PACKED)[:, None] & ok[None, :]
        at = tl.multiple_of(near.to(tl.int64) * stride_l, ALIGN)
        uv = tl.load(u_b + at[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)  # (TL, BC)
        tl.store(slot + k * C, tl.sum(gv * uv, axis=0), mask=ok)
        far = rows - (k - K // 2)
        mask = _seen(segments, rows, far, L, PACKED)[:, None] & ok[None, :]
        gk = tl.load(g_b + far[:, None].to(tl.int64) * C + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += gk * tl.load(w + cols * K + k, mask=ok, other=0.0).to(tl.float32)[None, :]
    tl.store(slot + K * C, tl.sum(gv, axis=0), mask=ok)
    to = tl.multiple_of(rows.to(tl.int64) * stride_dl, ALIGN_D)
    tl.store(du + b * stride_db + to[:, None] + cols[None, :], acc.to(du.dtype.element_ty), mask=here)
