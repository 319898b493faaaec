"""Backward of y = M x, first half: row sums of G = dM o M (rows), then dX and column sums (columns).

Outside the diagonal tiles G is never formed: its row sums are dY . Y of one direction alone, its column sums X . dX of
one direction. Both directions are therefore accumulated apart. No atomics; each output element belongs to one program.
"""

import triton
import triton.language as tl

from .mix import row_exponents, scaled_rows, span_between, tile_total
from .scores import load_rows


@triton.jit
def _row_sums(
    x_ptr,
    s_ptr,  # the row tile's block of scores, (QT, T, T)
    c_ptr,
    st_ptr,  # (N, P), the state that enters the chunk in this direction
    l_ptr,
    dt_ptr,
    out_ptr,  # (T,) plane 2 of this tile
    cross_ptr,  # (QT,) of this tile
    dy,  # (T, P) float32
    tile,
    first,
    last,
    stride_xl,
    stride_cl,
    L,
    N: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    DIRECTION: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PREC: tl.constexpr,
):
    """Rows of G outside the diagonal tile, and what of them comes from beyond each tile between. Farthest first."""
    t = tl.arange(0, T)
    dyr = dy * tl.exp2(row_exponents(l_ptr, tile, T, DIRECTION).to(tl.float32))[:, None]  # (T, P)
    acc = tl.zeros((T, P), tl.float32)
    count = tile - first if DIRECTION == 0 else last - 1 - tile
    if HAS_STATE:
        n = tl.arange(0, N)
        if DIRECTION == 0:
            span = span_between(l_ptr, first, tile, T, DIRECTION)
        else:
            span = span_between(l_ptr, tile + 1, last, T, DIRECTION)
        st = tl.load(st_ptr + n[:, None] * P + tl.arange(0, P)[None, :])  # (N, P)
        st = (st.to(tl.float32) * tl.exp2(span.to(tl.float32))).to(st.dtype)
        c = load_rows(c_ptr, tile * T + t + (-1 if DIRECTION == 0 else 1), n, stride_cl, L)  # (T, N)
        acc = tl.dot(c.to(st.dtype), st, acc, input_precision=PREC)
    for k in range(count):
        if DIRECTION == 0:
            other = first + k
            span = span_between(l_ptr, other + 1, tile, T, DIRECTION)
        else:
            other = last - 1 - k
            span = span_between(l_ptr, tile + 1, other, T, DIRECTION)
        tl.store(cross_ptr + (other - first), tl.sum(acc * dyr))
        s = tl.load(s_ptr + (other - first) * (T * T) + t[:, None] * T + t[None, :])  # (T, T)
        total = tile_total(l_ptr, other, T, DIRECTION)
        xw = scaled_rows(x_ptr, l_ptr, dt_ptr, other, span, total, stride_xl, L, P, T)  # (T, P)
        acc = tl.dot(s, xw.to(s.dtype), acc, input_precision=PREC)
    tl.store(out_ptr + t, tl.sum(acc * dyr, axis=1))


@triton.jit
def mix_rows_kernel(
    x,  # (B, L, H, P)
    dy,  # (B, L, H, P) contiguous
    S,  # (B, G, nT, QT, T, T)
    C_f,  # (B, L, G, N)
    C_b,
    states,  # (B, H, 2, nC, N, P)
    lf,  # (B, H, Lp)
    lb,
    dtf,
    dtb,
    sums,  # (12, B, H, Lp) planes 2 and 8 out
    cross,  # (B, H, 2, nT, QT) out
    stride_xb,
    stride_xl,
    stride_xh,
    stride_cb,
    stride_cl,
    stride_cg,
    B,
    L,
    H,
    G,
    Lp,
    nT,
    nC,
    QT,
    N: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PREC: tl.constexpr,
):
    pid = tl.program_id(0)
    tile = pid % nT
    h = (pid // nT) % H
    b = (pid // (nT * H)).to(tl.int64)
    g = h // (H // G)
    chunk = tile // QT
    first = chunk * QT
    last = first + QT
    rows = tile * T + tl.arange(0, T)
    head = (b * H + h) * Lp
    plane = tl.cast(B, tl.int64) * H * Lp
    x_ptr = x + b * stride_xb + h * stride_xh
    c_off = b * stride_cb + g * stride_cg
    s_ptr = S + ((b * G + g) * nT + tile) * QT * (T * T)
    st_ptr = states + (((b * H + h) * 2) * nC + chunk) * (N * P)
    out_ptr = sums + head + tile * T
    cross_ptr = cross + ((b * H + h) * 2 * nT + tile) * QT
    dyi = load_rows(dy + (b * L * H + h) * P, rows, tl.arange(0, P), H * P, L).to(tl.float32)  # (T, P)
    _row_sums(
        x_ptr, s_ptr, C_f + c_off, st_ptr, lf + head, dtf + head, out_ptr + 2 * plane, cross_ptr, dyi, tile, first,
        last, stride_xl, stride_cl, L, N, P, T, 0, HAS_STATE, PREC,
    )  # fmt: skip
    _row_sums(
        x_ptr, s_ptr, C_b + c_off, st_ptr + nC * (N * P), lb + head, dtb + head, out_ptr + 8 * plane,
        cross_ptr + nT * QT, dyi, tile, first, last, stride_xl, stride_cl, L, N, P, T, 1, HAS_STATE, PREC,
    )  # fmt: skip


@triton.jit
def _column(
    dy_ptr,
    st_ptr,  # the column tile's block of transposed scores, (QT, T, T)
    b_ptr,
    ds_ptr,  # (N, P), gradient of the state that leaves the chunk in this direction
    l_ptr,
    out_ptr,  # (T,) plane 3 of this tile
    onward_ptr,
    x,  # (T, P) float32
    dt,  # (T,)
    tile,
    first,
    last,
    stride_dl,
    stride_bl,
    L,
    N: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    DIRECTION: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PREC: tl.constexpr,
):
    """(T, P) float32: M^T dY / dt of one direction without the diagonal tile; stores its share of the column sums."""
    t = tl.arange(0, T)
    p = tl.arange(0, P)
    acc = tl.zeros((T, P), tl.float32)
    far = tile_total(l_ptr, tile, T, DIRECTION) - tl.load(l_ptr + tile * T + t)
    w = tl.exp2(far.to(tl.float32))  # (T,)
    if HAS_STATE:
        n = tl.arange(0, N)
        if DIRECTION == 0:
            span = span_between(l_ptr, tile + 1, last, T, DIRECTION)
        else:
            span = span_between(l_ptr, first, tile, T, DIRECTION)
        ds = tl.load(ds_ptr + n[:, None] * P + p[None, :])  # (N, P)
        ds = (ds.to(tl.float32) * tl.exp2(span.to(tl.float32))).to(ds.dtype)
        bj = load_rows(b_ptr, tile * T + t, n, stride_bl, L)  # (T, N)
        acc = tl.dot(bj.to(ds.dtype), ds, acc, input_precision=PREC)
        tl.store(onward_ptr, tl.sum(tl.sum(acc * x, axis=1) * w * dt))
    count = last - 1 - tile if DIRECTION == 0 else tile - first
    span = tl.zeros((), l_ptr.dtype.element_ty)
    for k in range(count):
        other = tile + 1 + k if DIRECTION == 0 else tile - 1 - k
        s = tl.load(st_ptr + (other - first) * (T * T) + t[:, None] * T + t[None, :])  # (T, T), [j, i]
        dyi = load_rows(dy_ptr, other * T + t, p, stride_dl, L)  # (T, P)
        r = tl.exp2((span + row_exponents(l_ptr, other, T, DIRECTION)).to(tl.float32))  # (T,)
        dyr = (dyi.to(tl.float32) * r[:, None]).to(dyi.dtype)
        acc = tl.dot(s, dyr.to(s.dtype), acc, input_precision=PREC)
        span += tile_total(l_ptr, other, T, DIRECTION)
    acc = acc * w[:, None]
    tl.store(out_ptr + t, tl.sum(acc * x, axis=1) * dt)
    return acc


@triton.jit
def mix_columns_kernel(
    x,  # (B, L, H, P)
    dy,  # (B, L, H, P) contiguous
    ST,  # (B, G, nT, QT, T, T)
    B_f,  # (B, L, G, N)
    B_b,
    dstates,  # (B, H, 2, nC, N, P)
    lf,  # (B, H, Lp)
    lb,
    dtf,
    dtb,
    diag,  # (B, H, L) float32, or (H,), or None
    ddiag,  # (B, L, H) float32: out, or, where FC, in
    fc,  # (H, H * P), where FC
    sums,  # (12, B, H, Lp) planes 3, 4, 9, 10 out
    onward,  # (B, H, 2, nT) out
    dx,  # (B, L, H, P) out
    stride_xb,
    stride_xl,
    stride_xh,
    stride_bb,
    stride_bl,
    stride_bg,
    stride_db,
    stride_dl,
    stride_dh,
    B,
    L,
    H,
    G,
    Lp,
    nT,
    nC,
    QT,
    N: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    DIAGONAL: tl.constexpr,
    FC: tl.constexpr,  # the diagonal depends on x: its gradient returns through fc
    HB: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PREC: tl.constexpr,
):
    pid = tl.program_id(0)
    tile = pid % nT
    h = (pid // nT) % H
    b = (pid // (nT * H)).to(tl.int64)
    g = h // (H // G)
    chunk = tile // QT
    first = chunk * QT
    last = first + QT
    t = tl.arange(0, T)
    p = tl.arange(0, P)
    rows = tile * T + t
    j = t[:, None]
    i = t[None, :]
    head = (b * H + h) * Lp
    lf_ptr = lf + head
    lb_ptr = lb + head
    dy_ptr = dy + (b * L * H + h) * P
    b_off = b * stride_bb + g * stride_bg
    st_ptr = ST + ((b * G + g) * nT + tile) * QT * (T * T)
    ds_ptr = dstates + (((b * H + h) * 2) * nC + chunk) * (N * P)
    xj = load_rows(x + b * stride_xb + h * stride_xh, rows, p, stride_xl, L).to(tl.float32)  # (T, P)
    dyj = load_rows(dy_ptr, rows, p, H * P, L)  # (T, P)
    dyw = dyj.to(ST.dtype.element_ty)
    s = tl.load(st_ptr + (tile - first) * (T * T) + j * T + i).to(tl.float32)  # (T, T), [j, i]
    row_f = row_exponents(lf_ptr, tile, T, 0)[None, :]
    row_b = row_exponents(lb_ptr, tile, T, 1)[None, :]
    e = tl.where(i > j, row_f - tl.load(lf_ptr + rows)[:, None], row_b - tl.load(lb_ptr + rows)[:, None])
    s = s * tl.exp2(tl.where(i == j, 0.0, e.to(tl.float32)))  # (T, T)

    plane = tl.cast(B, tl.int64) * H * Lp
    out_ptr = sums + head + tile * T
    onward_ptr = onward + (b * H + h) * 2 * nT + tile
    dt_j = tl.load(dtf + head + rows)  # (T,)
    u = _column(
        dy_ptr, st_ptr, B_f + b_off, ds_ptr, lf_ptr, out_ptr + 3 * plane, onward_ptr, xj, dt_j, tile, first, last,
        H * P, stride_bl, L, N, P, T, 0, HAS_STATE, PREC,
    )  # (T, P)  # fmt: skip
    u = tl.dot(tl.where(i > j, s, 0.0).to(dyw.dtype), dyw, u, input_precision=PREC)
    tl.store(out_ptr + 4 * plane + t, tl.sum(u * xj, axis=1))
    acc = u * dt_j[:, None]
    dt_j = tl.load(dtb + head + rows)
    u = _column(
        dy_ptr, st_ptr, B_b + b_off, ds_ptr + nC * (N * P), lb_ptr, out_ptr + 9 * plane, onward_ptr + nT, xj, dt_j,
        tile, first, last, H * P, stride_bl, L, N, P, T, 1, HAS_STATE, PREC,
    )  # (T, P)  # fmt: skip
    u = tl.dot(tl.where(i < j, s, 0.0).to(dyw.dtype), dyw, u, input_precision=PREC)
    tl.store(out_ptr + 10 * plane + t, tl.sum(u * xj, axis=1))
    acc += u * dt_j[:, None]

    if DIAGONAL != 0:
        dyf = dyj.to(tl.float32)
        if DIAGONAL == 1:
            acc += dyf * tl.load(diag + h)
        else:
            acc += dyf * tl.load(diag + (b * H + h) * L + rows, mask=rows < L, other=0.0)[:, None]
        if FC:
            wide: tl.constexpr = tl.bfloat16 if dy.dtype.element_ty == tl.bfloat16 else tl.float32
            for start in tl.static_range(0, HB, 16):
                hh = start + tl.arange(0, 16)
                some = hh < H
                dd = tl.load(
                    ddiag + (b * L + rows)[:, None] * H + hh[None, :],
                    mask=(rows < L)[:, None] & some[None, :],
                    other=0.0,
                )  # (T, 16)
                f = tl.load(fc + hh[:, None] * (H * P) + h * P + p[None, :], mask=some[:, None], other=0.0)  # (16, P)
                acc = tl.dot(dd.to(wide), f.to(wide), acc, input_precision=PREC)
        else:
            tl.store(ddiag + (b * L + rows) * H + h, tl.sum(dyf * xj, axis=1), mask=rows < L)
    out = dx + b * stride_db + h * stride_dh + rows[:, None].to(tl.int64) * stride_dl + p[None, :]
    tl.store(out, acc.to(dx.dtype.element_ty), mask=(rows < L)[:, None])
