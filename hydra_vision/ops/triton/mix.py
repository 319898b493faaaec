"""y = M x: one program a (row tile, head, batch). Both triangles of the row tile's chunk, then the states around it.

Diagonal tiles form M itself, with true exponentials. Off-diagonal tiles factor the decay into a row factor and a column
factor with the tile edge as reference, both <= 1: S needs no work at all, X is scaled a row, the sum is scaled a row.
"""

import triton
import triton.language as tl

from .scores import load_rows


@triton.jit
def row_exponents(l_ptr, tile, T: tl.constexpr, DIRECTION: tl.constexpr):
    """(T,) exponent from the tile's near edge to the row's neighbour: lf[i-1] or lb[i+1], 0 at the edge."""
    t = tl.arange(0, T)
    near = t - 1 if DIRECTION == 0 else t + 1
    return tl.load(l_ptr + tile * T + near, mask=(near >= 0) & (near < T), other=0.0)


@triton.jit
def tile_total(l_ptr, tile, T: tl.constexpr, DIRECTION: tl.constexpr):
    """Sum of the log2-decays of a whole tile."""
    return tl.load(l_ptr + tile * T + (T - 1 if DIRECTION == 0 else 0))


@triton.jit
def span_between(l_ptr, low, high, T: tl.constexpr, DIRECTION: tl.constexpr):
    """Sum of the log2-decays of tiles low .. high - 1."""
    span = tl.zeros((), l_ptr.dtype.element_ty)
    for tile in range(low, high):
        span += tile_total(l_ptr, tile, T, DIRECTION)
    return span


@triton.jit
def diagonal_decays(lf_ptr, lb_ptr, tile, T: tl.constexpr):
    """(T, T): exp2 of the sums between i and j, forward below the diagonal, backward above; 1 on it."""
    t = tl.arange(0, T)
    i = t[:, None]
    j = t[None, :]
    row_f = row_exponents(lf_ptr, tile, T, 0)
    row_b = row_exponents(lb_ptr, tile, T, 1)
    col_f = tl.load(lf_ptr + tile * T + t)
    col_b = tl.load(lb_ptr + tile * T + t)
    e = tl.where(i > j, row_f[:, None] - col_f[None, :], row_b[:, None] - col_b[None, :])  # (T, T)
    return tl.exp2(tl.where(i == j, 0.0, e.to(tl.float32)))


@triton.jit
def scaled_rows(x_ptr, l_ptr, dt_ptr, tile, span, total, stride_l, L, P: tl.constexpr, T: tl.constexpr):
    """(T, P): rows j of x times dt_j and their decay to a point ``span`` beyond the tile's far edge."""
    t = tl.arange(0, T)
    rows = tile * T + t
    x = load_rows(x_ptr, rows, tl.arange(0, P), stride_l, L)  # (T, P)
    w = tl.exp2((span + total - tl.load(l_ptr + rows)).to(tl.float32)) * tl.load(dt_ptr + rows)  # (T,)
    return (x.to(tl.float32) * w[:, None]).to(x.dtype)


@triton.jit
def off_diagonal(
    x_ptr,
    s_ptr,  # the row tile's block of scores, (QT, T, T)
    c_ptr,
    st_ptr,  # (N, P), the state that enters the chunk in this direction
    l_ptr,
    dt_ptr,
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
    """(T, P) float32: what tiles of the chunk other than its own, and the state, add to the row tile."""
    t = tl.arange(0, T)
    acc = tl.zeros((T, P), tl.float32)
    span = tl.zeros((), l_ptr.dtype.element_ty)
    count = tile - first if DIRECTION == 0 else last - 1 - tile
    for k in range(count):
        other = tile - 1 - k if DIRECTION == 0 else tile + 1 + k
        total = tile_total(l_ptr, other, T, DIRECTION)
        s = tl.load(s_ptr + (other - first) * (T * T) + t[:, None] * T + t[None, :])  # (T, T)
        xw = scaled_rows(x_ptr, l_ptr, dt_ptr, other, span, total, stride_xl, L, P, T)  # (T, P)
        acc = tl.dot(s, xw.to(s.dtype), acc, input_precision=PREC)
        span += total
    if HAS_STATE:
        n = tl.arange(0, N)
        st = tl.load(st_ptr + n[:, None] * P + tl.arange(0, P)[None, :])  # (N, P)
        st = (st.to(tl.float32) * tl.exp2(span.to(tl.float32))).to(st.dtype)
        c = load_rows(c_ptr, tile * T + t + (-1 if DIRECTION == 0 else 1), n, stride_cl, L)  # (T, N)
        acc = tl.dot(c.to(st.dtype), st, acc, input_precision=PREC)
    return acc


@triton.jit
def mix_kernel(
    x,  # (B, L, H, P)
    S,  # (B, G, nT, QT, T, T)
    C_f,  # (B, L, G, N)
    C_b,
    states,  # (B, H, 2, nC, N, P)
    lf,  # (B, H, Lp)
    lb,
    dtf,
    dtb,
    diag,  # (B, H, L) float32, or (H,), or None
    y,  # (B, L, H, P) contiguous, out
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
    DIAGONAL: tl.constexpr,  # 0: none, 1: a head, 2: a token and head
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
    head = (b * H + h) * Lp
    lf_ptr = lf + head
    lb_ptr = lb + head
    dtf_ptr = dtf + head
    dtb_ptr = dtb + head
    x_ptr = x + b * stride_xb + h * stride_xh
    c_off = b * stride_cb + g * stride_cg
    s_ptr = S + ((b * G + g) * nT + tile) * QT * (T * T)
    st_ptr = states + (((b * H + h) * 2) * nC + chunk) * (N * P)

    acc_f = off_diagonal(
        x_ptr, s_ptr, C_f + c_off, st_ptr, lf_ptr, dtf_ptr, tile, first, last, stride_xl, stride_cl, L, N, P, T,
        0, HAS_STATE, PREC,
    )  # (T, P)  # fmt: skip
    acc = acc_f * tl.exp2(row_exponents(lf_ptr, tile, T, 0).to(tl.float32))[:, None]
    acc_b = off_diagonal(
        x_ptr, s_ptr, C_b + c_off, st_ptr + nC * (N * P), lb_ptr, dtb_ptr, tile, first, last, stride_xl, stride_cl, L,
        N, P, T, 1, HAS_STATE, PREC,
    )  # (T, P)  # fmt: skip
    acc += acc_b * tl.exp2(row_exponents(lb_ptr, tile, T, 1).to(tl.float32))[:, None]

    i = t[:, None]
    j = t[None, :]
    s = tl.load(s_ptr + (tile - first) * (T * T) + i * T + j)  # (T, T)
    dt_j = tl.where(i > j, tl.load(dtf_ptr + rows)[None, :], tl.load(dtb_ptr + rows)[None, :])  # (T, T)
    m = s.to(tl.float32) * diagonal_decays(lf_ptr, lb_ptr, tile, T) * dt_j
    d = tl.zeros((T,), tl.float32)
    if DIAGONAL == 1:
        d += tl.load(diag + h)
    if DIAGONAL == 2:
        d = tl.load(diag + (b * H + h) * L + rows, mask=rows < L, other=0.0)
    m = tl.where(i == j, d[:, None], m)
    xi = load_rows(x_ptr, rows, p, stride_xl, L)  # (T, P)
    acc = tl.dot(m.to(xi.dtype), xi, acc, input_precision=PREC)
    out = y + ((b * L + rows[:, None]) * H + h) * P + p[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=(rows < L)[:, None])
