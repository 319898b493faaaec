"""Depthwise same-padded convolution + SiLU over [x, B, C], the diagonal fc_D(x) + D, and the convolution's backward.

Seven taps (every released model) walk down the sequence with a window of rows in registers: each row is read once and
nothing is recomputed. Other widths use one tile a program and shifted loads. Backward fuses the activation's gradient,
the transposed convolution and the weight's gradient, so that the intermediate never leaves the registers.
"""

# ruff: noqa: RUF005  (Triton unpacks no tuples)

import triton
import triton.language as tl


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """1 / (1 + exp(-x)); FAST: to 2^-12, as good as bfloat16, in three instructions (not in the interpreter)."""
    if FAST:
        half = tl.inline_asm_elementwise(
            'tanh.approx.f32 $0, $1;', '=f,f', [0.5 * x], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 + 0.5 * half
    else:
        return tl.sigmoid(x)


@triton.jit
def _silu_gradient(pre, FAST: tl.constexpr):
    sig = sigmoid(pre, FAST)
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
def _dot7(a, b):
    """Sum of the products of two tuples of seven."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3] + a[4] * b[4] + a[5] * b[5] + a[6] * b[6]


@triton.jit
def _lane(ptr, row, cols, ok, L, MASK: tl.constexpr):
    """(BC,) the row of ``ptr``, which is row ``row`` of the sequence; zero outside of it."""
    if MASK:
        here = row + tl.zeros_like(cols)  # (BC,), so that the mask is a tensor of booleans in the interpreter too
        return tl.load(ptr, mask=ok & (here >= 0) & (here < L), other=0.0)
    else:
        return tl.load(ptr, mask=ok, other=0.0)


@triton.jit
def _seven_rows(
    u, g, du, x, d, s, n, m, w, bv, t, start, stop, cols, ok, L,
    SU: tl.constexpr, SG: tl.constexpr, SD: tl.constexpr, MASK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Rows t to t + 6 of the convolution's backward; u, g, du point to row t, everything else as in the kernel."""
    for step in tl.static_range(7):
        row = t + step
        x = x + (n[0].to(tl.float32),)  # rows row - 3 to row + 3
        grad = m[0].to(tl.float32)
        # four rows ahead are on their way
        n = (n[1], n[2], n[3], _lane(u + (step + 7) * SU, row + 7, cols, ok, L, MASK))
        m = (m[1], m[2], m[3], _lane(g + (step + 4) * SG, row + 4, cols, ok, L, MASK))
        d = (grad * _silu_gradient(bv + _dot7(x, w), FAST), d[0], d[1], d[2], d[3], d[4], d[5])
        back = _dot7(d, w).to(du.dtype.element_ty)  # row - 3
        own = d[0]
        if MASK:
            here = row + tl.zeros_like(cols)
            tl.store(du + (step - 3) * SD, back, mask=ok & (here - 3 >= start) & (here - 3 < stop))
            own = tl.where((here >= start) & (here < stop), own, 0.0)
        else:
            tl.store(du + (step - 3) * SD, back, mask=ok)
        s = (
            s[0] + own * x[0], s[1] + own * x[1], s[2] + own * x[2], s[3] + own * x[3], s[4] + own * x[4],
            s[5] + own * x[5], s[6] + own * x[6], s[7] + own,
        )  # fmt: skip
        x = (x[1], x[2], x[3], x[4], x[5], x[6])
        d = (d[0], d[1], d[2], d[3], d[4], d[5])
    return x, d, s, n, m


@triton.jit
def conv7_backward_kernel(
    u,  # (B, L, C) rows of SU elements
    w,  # (C, 7)
    bias,  # (C,)
    g,  # (B, L, C) contiguous: gradient after the activation
    du,  # (B, L, C) rows of SD elements, out
    part,  # (B, segments, 8, C) float32, out: weight and bias gradients of the segment
    stride_b,
    stride_db,
    L,
    SEGMENT,
    SU: tl.constexpr,
    SD: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FAST: tl.constexpr,
):
    blocks: tl.constexpr = (C + BC - 1) // BC
    segments = tl.cdiv(L, SEGMENT)
    block = tl.program_id(0) % blocks
    segment = (tl.program_id(0) // blocks) % segments
    b = (tl.program_id(0) // (blocks * segments)).to(tl.int64)
    cols = block * BC + tl.arange(0, BC)
    ok = cols < C
    weights = (tl.load(w + cols * 7, mask=ok, other=0.0).to(tl.float32),)  # seven of (BC,)
    for k in tl.static_range(1, 7):
        weights = weights + (tl.load(w + cols * 7 + k, mask=ok, other=0.0).to(tl.float32),)
    bv = tl.zeros((BC,), tl.float32)
    if HAS_BIAS:
        bv += tl.load(bias + cols, mask=ok, other=0.0).to(tl.float32)
    start = segment * SEGMENT
    stop = tl.minimum(start + SEGMENT, L)
    t = start - 3
    u_t = u + b * stride_b + t * tl.cast(SU, tl.int64) + cols
    g_t = g + (b * L + t) * tl.cast(C, tl.int64) + cols
    du_t = du + b * stride_db + t * tl.cast(SD, tl.int64) + cols
    x = (_lane(u_t - 3 * SU, t - 3, cols, ok, L, True).to(tl.float32),)  # rows t - 3 to t + 2
    for k in tl.static_range(1, 6):
        x = x + (_lane(u_t + (k - 3) * SU, t + (k - 3), cols, ok, L, True).to(tl.float32),)
    n = (_lane(u_t + 3 * SU, t + 3, cols, ok, L, True),)  # u of rows t + 3 to t + 6, g of rows t to t + 3
    m = (_lane(g_t, t, cols, ok, L, True),)
    for k in tl.static_range(1, 4):
        n = n + (_lane(u_t + (k + 3) * SU, t + (k + 3), cols, ok, L, True),)
        m = m + (_lane(g_t + k * C, t + k, cols, ok, L, True),)
    # Gradients before the activation of rows t - 1 to t - 6. Triton 3.6 takes loop variables that start as one value
    # and are handed on from one to the next for constants: they start as different values (in lanes never stored).
    d = (tl.where(ok, 0.0, 1.0),)
    s = (tl.zeros((BC,), tl.float32),)
    for k in tl.static_range(1, 6):
        d = d + (tl.where(ok, 0.0, 1.0 + k),)
    for _ in tl.static_range(1, 8):
        s = s + (tl.zeros((BC,), tl.float32),)
    for t in range(start - 3, stop + 3, 7):
        if (t - 3 >= start) & (t + 13 < L) & (t + 6 < stop):
            x, d, s, n, m = _seven_rows(
                u_t, g_t, du_t, x, d, s, n, m, weights, bv, t, start, stop, cols, ok, L, SU, C, SD, False, FAST
            )
        else:
            x, d, s, n, m = _seven_rows(
                u_t, g_t, du_t, x, d, s, n, m, weights, bv, t, start, stop, cols, ok, L, SU, C, SD, True, FAST
            )
        u_t += 7 * SU
        g_t += 7 * C
        du_t += 7 * SD
    slot = part + (b * segments + segment) * 8 * C + cols
    for k in tl.static_range(8):
        tl.store(slot + k * C, s[k], mask=ok)


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
    grad = tl.load(at, mask=keep, other=0.0).to(tl.float32) * _silu_gradient(pre, False)
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
