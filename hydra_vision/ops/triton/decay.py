"""Step sizes and decays: softplus, clamp, and sums of log2-decays inside each tile of T tokens. And their backward.

All arrays that other kernels read are head-major, (B, H, Lp), Lp = T * number of tiles; padded tokens have dt = 0.
``lf[t]`` sums A * dt_f * log2(e) from the tile's first token through t, ``lb[t]`` that of dt_b from t through the
tile's last token. Every exponent of the operator is a difference of two of them plus whole-tile sums, all <= 0, so
nothing overflows and small sums are not lost beside large ones of other tiles.
"""

import triton
import triton.language as tl

# Where dt is folded into an exponent, zero becomes this: nothing beside any other term, yet sums can be divided by it.
DT_TINY = tl.constexpr(1e-30)


@triton.jit
def _log1p(e):
    # 2 atanh(e / (2 + e)): accurate to float32 for every e in [0, 1], also where 1 + e rounds to 1
    s = e / (2.0 + e)
    q = s * s
    p = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))))))
    return 2.0 * s * p


@triton.jit
def log2(x, FAST: tl.constexpr):
    """FAST: to 2^-22, one instruction (not in the interpreter)."""
    if FAST:
        return tl.inline_asm_elementwise(
            'lg2.approx.ftz.f32 $0, $1;', '=f,f', [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def _exp(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            'ex2.approx.ftz.f32 $0, $1;', '=f,f', [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp(x)


@triton.jit
def _softplus(v, FAST: tl.constexpr):
    """FAST: to 4e-6 of itself."""
    e = _exp(-tl.abs(v), FAST)
    if FAST:
        series = e * (1 - e * (1 / 2 - e * (1 / 3 - e * (1 / 4))))
        rest = tl.where(e < 0.03125, series, log2(1.0 + e, FAST) * 0.6931471805599453)
    else:
        rest = _log1p(e)
    return tl.maximum(v, 0.0) + rest


@triton.jit
def _load_dt(
    ptr, rows, heads, stride_l, L, H, bias, DT_MIN, DT_MAX, SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Raw value before softplus and dt, both (T, HB) float32; dt = 0 outside the sequence."""
    mask = (rows < L)[:, None] & (heads < H)[None, :]  # (T, HB)
    raw = tl.load(ptr + rows[:, None].to(tl.int64) * stride_l + heads[None, :], mask=mask, other=0.0).to(tl.float32)
    dt = raw
    if SOFTPLUS:
        raw = raw + bias[None, :]  # (T, HB)
        dt = _softplus(raw, FAST)
    if LIMIT:
        dt = tl.minimum(tl.maximum(dt, DT_MIN), DT_MAX)
    return raw, tl.where(mask, dt, 0.0)


@triton.jit
def _is_border(segments, rows, L, step: tl.constexpr):
    """(T,) Whether the next token in the direction of ``step`` belongs to another sequence."""
    near = rows + step
    inside = (rows < L) & (near >= 0) & (near < L)
    here = tl.load(segments + rows, mask=inside, other=0)
    return inside & (here != tl.load(segments + near, mask=inside, other=0))


@triton.jit
def _head_decay(A, heads, H, A_IS_LOG: tl.constexpr):
    a = tl.load(A + heads, mask=heads < H, other=0.0).to(tl.float32)  # (HB,)
    if A_IS_LOG:
        a = -tl.exp(a)
    return a


@triton.jit
def decay_kernel(
    dtf_in,  # (B, L, H), rows of any stride
    dtb_in,
    dt_bias,  # (H,)
    A,  # (H,)
    segments,  # (L,) the sequence of each token, where PACKED
    lf,  # (B, H, Lp) out, float32 or float64
    lb,
    cf,  # (B, H, Lp) out, as lf: lf - log2(dt_f), so that a column's dt costs nothing
    cb,
    stride_b,
    stride_l,
    L,
    H,
    Lp,
    DT_MIN,
    DT_MAX,
    SOFTPLUS: tl.constexpr,
    LIMIT: tl.constexpr,
    A_IS_LOG: tl.constexpr,
    PACKED: tl.constexpr,
    HB: tl.constexpr,
    T: tl.constexpr,
):
    tile = tl.program_id(0) % (Lp // T)
    b = (tl.program_id(0) // (Lp // T)).to(tl.int64)
    hb = tl.program_id(1)
    rows = tile * T + tl.arange(0, T)
    heads = hb * HB + tl.arange(0, HB)
    bias = tl.zeros((HB,), tl.float32)
    if SOFTPLUS:
        bias = tl.load(dt_bias + heads, mask=heads < H, other=0.0).to(tl.float32)
    a = _head_decay(A, heads, H, A_IS_LOG)
    out = (b * H + heads[None, :]) * Lp + rows[:, None]  # (T, HB)
    keep = (heads < H)[None, :] & (rows < Lp)[:, None]
    sums = lf.dtype.element_ty
    for direction in tl.static_range(2):
        source = dtf_in if direction == 0 else dtb_in
        _, dt = _load_dt(
            source + b * stride_b, rows, heads, stride_l, L, H, bias, DT_MIN, DT_MAX, SOFTPLUS, LIMIT, False
        )
        # a term below -200 makes every factor that contains it zero: cut off there, so that sums stay precise
        step = tl.maximum(dt.to(sums) * a[None, :].to(sums) * 1.4426950408889634, -200.0)  # (T, HB)
        if PACKED:  # the last token of a sequence forgets everything, and writes nothing (packed.py)
            border = _is_border(segments, rows, L, 1 if direction == 0 else -1)[:, None]
            step = tl.where(border, -200.0, step)
        total = tl.cumsum(step, axis=0, reverse=direction == 1)
        tl.store((lf if direction == 0 else lb) + out, total, mask=keep)
        column = total - tl.log2(tl.maximum(dt, DT_TINY).to(sums))
        if PACKED:
            column = tl.where(border, total + 1000.0, column)
        tl.store((cf if direction == 0 else cb) + out, column, mask=keep)


@triton.jit
def decay_backward_kernel(
    dtf_in,
    dtb_in,
    dt_bias,
    A,
    segments,  # (L,), where PACKED
    sums,  # (planes, B, H, Lp), see ``Plan.planes``: sums of G = dM o M over rows and columns
    through,  # (B, H, 2, nT): what crosses the whole tile
    ddtf,  # (B, L, H) out, rows of any stride
    ddtb,
    part,  # (2, B, nT, H) out, float32: gradients of A and of the bias, by tile
    stride_b,
    stride_l,
    stride_gb,
    stride_gl,
    B,
    L,
    H,
    Lp,
    nT,
    DT_MIN,
    DT_MAX,
    SOFTPLUS: tl.constexpr,
    LIMIT: tl.constexpr,
    A_IS_LOG: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_STATE: tl.constexpr,
    EXACT: tl.constexpr,
    HB: tl.constexpr,
    T: tl.constexpr,
):
    """Every sum has terms of one kind: nothing cancels, whatever the rounding of the products that it adds.

    The gradient of the decay of token k is the sum of G over the pairs that k lies between: both ends in k's tile, one
    of them, or none.
    """
    tile = tl.program_id(0) % nT
    b = (tl.program_id(0) // nT).to(tl.int64)
    hb = tl.program_id(1)
    t = tl.arange(0, T)
    rows = tile * T + t
    heads = hb * HB + tl.arange(0, HB)
    ok = heads < H
    bias = tl.zeros((HB,), tl.float32)
    if SOFTPLUS:
        bias = tl.load(dt_bias + heads, mask=ok, other=0.0).to(tl.float32)
    a = _head_decay(A, heads, H, A_IS_LOG)
    sum_A = tl.zeros((HB,), tl.float32)
    sum_bias = tl.zeros((HB,), tl.float32)
    seen = (rows < L)[:, None] & ok[None, :]  # (T, HB)
    plane = tl.cast(B, tl.int64) * H * Lp
    base = sums + (b * H + heads[None, :]) * Lp + tile * T  # (1, HB)
    for direction in tl.static_range(2):
        source = dtf_in if direction == 0 else dtb_in
        target = ddtf if direction == 0 else ddtb
        own = base + direction * plane
        value, dt = _load_dt(
            source + b * stride_b, rows, heads, stride_l, L, H, bias, DT_MIN, DT_MAX, SOFTPLUS, LIMIT, False
        )  # (T, HB)
        after = t + 1 if direction == 0 else t - 1  # the query side, one step from the token
        has_after = ((after >= 0) & (after < T) & (tile * T + after < L))[:, None] & ok[None, :]
        inner = tl.load(own + after[:, None], mask=has_after, other=0.0)  # (T, HB), rows, both ends in the tile
        inner -= tl.load(own + 2 * plane + t[:, None], mask=seen, other=0.0)  # columns of the same float32 G
        if HAS_STATE:
            inner += tl.load(own + 4 * plane + after[:, None], mask=has_after, other=0.0)
        da = tl.cumsum(inner, axis=0, reverse=direction == 0)
        outer = tl.zeros((T, HB), tl.float32)
        if HAS_STATE:
            outer = tl.load(own + 6 * plane + t[:, None], mask=seen, other=0.0)
            da += tl.cumsum(outer, axis=0, reverse=direction == 1) - outer
            pair = (b * H + heads) * 2 + direction  # (HB,)
            da += tl.load(through + pair * nT + tile, mask=ok, other=0.0)[None, :]
        column = tl.load(own + (8 if EXACT else 2) * plane + t[:, None], mask=seen, other=0.0)
        raw = (column + outer) / tl.maximum(dt, DT_TINY)
        used = seen
        if PACKED:
            used = seen & ~_is_border(segments, rows, L, 1 if direction == 0 else -1)[:, None]
        sum_A += tl.sum(tl.where(used, da * dt, 0.0), axis=0)
        g = da * a[None, :] + raw
        if LIMIT:
            free = _softplus(value, False) if SOFTPLUS else value
            g = tl.where((free >= DT_MIN) & (free <= DT_MAX), g, 0.0)
        if SOFTPLUS:
            g = g * tl.sigmoid(value)
        g = tl.where(used, g, 0.0)
        sum_bias += tl.sum(g, axis=0)
        where = target + b * stride_gb + rows[:, None].to(tl.int64) * stride_gl + heads[None, :]
        tl.store(where, g.to(target.dtype.element_ty), mask=seen)
    if A_IS_LOG:
        sum_A = sum_A * a
    at = part + (b * nT + tile) * H + heads
    tl.store(at, sum_A, mask=ok)
    tl.store(at + tl.cast(B, tl.int64) * nT * H, sum_bias, mask=ok)
