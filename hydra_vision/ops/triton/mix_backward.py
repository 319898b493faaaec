"""Backward of y = M x, first half: row sums of G = dM o M (rows), then dX and column sums (columns).

G is never formed: its row sums are the products dY . Y of one direction alone, its column sums X . dX of one direction.
Both directions are therefore accumulated apart. No atomics; each output element belongs to one program.
"""

import triton
import triton.language as tl

from .mix import diagonal_decays, off_diagonal, row_exponents, tile_total
from .scores import load_rows


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
    row_f,  # (B, H, Lp) float32, out
    row_b,
    stride_xb,
    stride_xl,
    stride_xh,
    stride_cb,
    stride_cl,
    stride_cg,
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
    last = tl.minimum(first + QT, nT)
    t = tl.arange(0, T)
    p = tl.arange(0, P)
    rows = tile * T + t
    i = t[:, None]
    j = t[None, :]
    head = (b * H + h) * Lp
    x_ptr = x + b * stride_xb + h * stride_xh
    c_off = b * stride_cb + g * stride_cg
    s_ptr = S + ((b * G + g) * nT + tile) * QT * (T * T)
    st_ptr = states + (((b * H + h) * 2) * nC + chunk) * (N * P)
    dy_i = load_rows(dy + (b * L * H + h) * P, rows, p, H * P, L).to(tl.float32)  # (T, P)
    xi = load_rows(x_ptr, rows, p, stride_xl, L)  # (T, P)
    s = tl.load(s_ptr + (tile - first) * (T * T) + i * T + j).to(tl.float32)  # (T, T)
    m = s * diagonal_decays(lf + head, lb + head, tile, T)

    y_f = off_diagonal(
        x_ptr, s_ptr, C_f + c_off, st_ptr, lf + head, dtf + head, tile, first, last, stride_xl, stride_cl, L, N, P, T,
        0, HAS_STATE, PREC,
    )  # (T, P)  # fmt: skip
    y_f = y_f * tl.exp2(row_exponents(lf + head, tile, T, 0).to(tl.float32))[:, None]
    m_f = tl.where(i > j, m * tl.load(dtf + head + rows)[None, :], 0.0)  # (T, T)
    y_f = tl.dot(m_f.to(xi.dtype), xi, y_f, input_precision=PREC)
    tl.store(row_f + head + rows, tl.sum(y_f * dy_i, axis=1))

    y_b = off_diagonal(
        x_ptr, s_ptr, C_b + c_off, st_ptr + nC * (N * P), lb + head, dtb + head, tile, first, last, stride_xl,
        stride_cl, L, N, P, T, 1, HAS_STATE, PREC,
    )  # (T, P)  # fmt: skip
    y_b = y_b * tl.exp2(row_exponents(lb + head, tile, T, 1).to(tl.float32))[:, None]
    m_b = tl.where(i < j, m * tl.load(dtb + head + rows)[None, :], 0.0)  # (T, T)
    y_b = tl.dot(m_b.to(xi.dtype), xi, y_b, input_precision=PREC)
    tl.store(row_b + head + rows, tl.sum(y_b * dy_i, axis=1))


@triton.jit
def _column(
    dy_ptr,
    st_ptr,  # the column tile's block of transposed scores, (QT, T, T)
    b_ptr,
    ds_ptr,  # (N, P), gradient of the state that leaves the chunk in this direction
    l_ptr,
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
    """(T, P) float32: M^T dY / dt of one direction, without the diagonal tile."""
    t = tl.arange(0, T)
    p = tl.arange(0, P)
    acc = tl.zeros((T, P), tl.float32)
    span = tl.zeros((), l_ptr.dtype.element_ty)
    count = last - 1 - tile if DIRECTION == 0 else tile - first
    for k in range(count):
        other = tile + 1 + k if DIRECTION == 0 else tile - 1 - k
        s = tl.load(st_ptr + (other - first) * (T * T) + t[:, None] * T + t[None, :])  # (T, T), [j, i]
        dyi = load_rows(dy_ptr, other * T + t, p, stride_dl, L)  # (T, P)
        r = tl.exp2((span + row_exponents(l_ptr, other, T, DIRECTION)).to(tl.float32))  # (T,)
        acc = tl.dot(s, (dyi.to(tl.float32) * r[:, None]).to(dyi.dtype), acc, input_precision=PREC)
        span += tile_total(l_ptr, other, T, DIRECTION)
    if HAS_STATE:
        n = tl.arange(0, N)
        ds = tl.load(ds_ptr + n[:, None] * P + p[None, :])  # (N, P)
        ds = (ds.to(tl.float32) * tl.exp2(span.to(tl.float32))).to(ds.dtype)
        bj = load_rows(b_ptr, tile * T + t, n, stride_bl, L)  # (T, N)
        acc = tl.dot(bj.to(ds.dtype), ds, acc, input_precision=PREC)
    far = tile_total(l_ptr, tile, T, DIRECTION) - tl.load(l_ptr + tile * T + t)
    return acc * tl.exp2(far.to(tl.float32))[:, None]


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
    diag,  # (B, H, Lp) float32, or (H,), or None
    raw_f,  # (B, H, Lp) float32, out: column sums / dt
    raw_b,
    ddiag,  # (B, L, H) float32, out, or None
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
    last = tl.minimum(first + QT, nT)
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
    s = tl.load(st_ptr + (tile - first) * (T * T) + j * T + i).to(tl.float32)  # (T, T), [j, i]
    row_f = row_exponents(lf_ptr, tile, T, 0)[None, :]
    row_b = row_exponents(lb_ptr, tile, T, 1)[None, :]
    e = tl.where(i > j, row_f - tl.load(lf_ptr + rows)[:, None], row_b - tl.load(lb_ptr + rows)[:, None])
    s = s * tl.exp2(tl.where(i == j, 0.0, e.to(tl.float32)))  # (T, T)

    u = _column(
        dy_ptr, st_ptr, B_f + b_off, ds_ptr, lf_ptr, tile, first, last, H * P, stride_bl, L, N, P, T, 0, HAS_STATE,
        PREC,
    )  # (T, P)  # fmt: skip
    u = tl.dot(tl.where(i > j, s, 0.0).to(dyj.dtype), dyj, u, input_precision=PREC)
    tl.store(raw_f + head + rows, tl.sum(u * xj, axis=1))
    acc = u * tl.load(dtf + head + rows)[:, None]
    u = _column(
        dy_ptr, st_ptr, B_b + b_off, ds_ptr + nC * (N * P), lb_ptr, tile, first, last, H * P, stride_bl, L, N, P, T,
        1, HAS_STATE, PREC,
    )  # (T, P)  # fmt: skip
    u = tl.dot(tl.where(i < j, s, 0.0).to(dyj.dtype), dyj, u, input_precision=PREC)
    tl.store(raw_b + head + rows, tl.sum(u * xj, axis=1))
    acc += u * tl.load(dtb + head + rows)[:, None]

    if DIAGONAL != 0:
        dyf = dyj.to(tl.float32)
        if DIAGONAL == 1:
            acc += dyf * tl.load(diag + h)
        else:
            acc += dyf * tl.load(diag + head + rows)[:, None]
        tl.store(ddiag + (b * L + rows) * H + h, tl.sum(dyf * xj, axis=1), mask=rows < L)
    out = dx + b * stride_db + h * stride_dh + rows[:, None].to(tl.int64) * stride_dl + p[None, :]
    tl.store(out, acc.to(dx.dtype.element_ty), mask=(rows < L)[:, None])
