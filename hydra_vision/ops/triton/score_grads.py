"""Backward of y = M x, second half: the scores' gradient, summed over the heads of a group, then B's and C's.

dS[i, j] = sum_h (dY_i . X_j) * decay * dt_j. On off-diagonal tiles the decay factors into the operands, so the sum over
heads is one long matrix product; on diagonal tiles each head's product is scaled by its own exponentials.
"""

import triton
import triton.language as tl

from .mix import diagonal_decays
from .scores import load_cols, load_rows


@triton.jit
def score_grads_kernel(
    x,  # (B, L, H, P)
    dy,  # (B, L, H, P) contiguous
    lf,  # (B, H, Lp)
    lb,
    dtf,
    dtb,
    S,  # (B, G, nT, QT, T, T)
    sums,  # (12, B, H, Lp) planes 0, 1, 6, 7 out: rows and columns of the diagonal tile's G
    dS,  # (B, G, nT, QT, T, T) out: [I][J - first]
    dST,  # (B, G, nT, QT, T, T) out: [J][I - first], each tile transposed
    stride_xb,
    stride_xl,
    stride_xh,
    B,
    L,
    H,
    G,
    Lp,
    nT,
    QT,
    P: tl.constexpr,
    T: tl.constexpr,
    PREC: tl.constexpr,
):
    pid = tl.program_id(0)
    column = pid % QT
    tile = (pid // QT) % nT
    g = (pid // (QT * nT)) % G
    b = (pid // (QT * nT * G)).to(tl.int64)
    first = (tile // QT) * QT
    other = first + column
    t = tl.arange(0, T)
    p = tl.arange(0, P)
    i = t[:, None]
    j = t[None, :]
    rows = tile * T + t
    cols = other * T + t
    heads = H // G
    block = (b * G + g) * nT
    plane = tl.cast(B, tl.int64) * H * Lp
    acc = tl.zeros((T, T), tl.float32)
    if other == tile:
        s = tl.load(S + ((block + tile) * QT + column) * (T * T) + i * T + j).to(tl.float32)  # (T, T)
        for k in range(heads):
            head = (b * H + g * heads + k) * Lp
            dyi = load_rows(dy + (b * L * H + g * heads + k) * P, rows, p, H * P, L)  # (T, P)
            xj = load_cols(x + b * stride_xb + (g * heads + k) * stride_xh, cols, p, stride_xl, L)  # (P, T)
            dt_j = tl.where(i > j, tl.load(dtf + head + cols)[None, :], tl.load(dtb + head + cols)[None, :])
            decay = diagonal_decays(lf + head, lb + head, tile, T) * dt_j  # (T, T)
            product = tl.where(i == j, 0.0, tl.dot(dyi, xj, input_precision=PREC) * decay)
            acc += product
            product *= s
            at = sums + head + rows
            lower = tl.where(i > j + 1, product, 0.0)  # no token lies between neighbours
            tl.store(at, tl.sum(lower, axis=1))
            tl.store(at + plane, tl.sum(lower, axis=0))
            upper = tl.where(i < j - 1, product, 0.0)
            tl.store(at + 6 * plane, tl.sum(upper, axis=1))
            tl.store(at + 7 * plane, tl.sum(upper, axis=0))
    else:
        l_all = lf
        dt_all = dtf
        shift = -1
        low = other + 1
        high = tile
        last = T - 1
        if other > tile:
            l_all = lb
            dt_all = dtb
            shift = 1
            low = tile + 1
            high = other
            last = 0
        near = t + shift
        for k in range(heads):
            head = (b * H + g * heads + k) * Lp
            dyi = load_rows(dy + (b * L * H + g * heads + k) * P, rows, p, H * P, L)  # (T, P)
            xj = load_cols(x + b * stride_xb + (g * heads + k) * stride_xh, cols, p, stride_xl, L)  # (P, T)
            l_ptr = l_all + head
            w = tl.load(l_ptr + other * T + last) - tl.load(l_ptr + cols)  # (T,)
            for between in range(low, high):
                w += tl.load(l_ptr + between * T + last)
            r = tl.load(l_ptr + tile * T + near, mask=(near >= 0) & (near < T), other=0.0)  # (T,)
            wx = tl.exp2(w.to(tl.float32)) * tl.load(dt_all + head + cols)
            dyr = (dyi.to(tl.float32) * tl.exp2(r.to(tl.float32))[:, None]).to(dyi.dtype)  # (T, P)
            xw = (xj.to(tl.float32) * wx[None, :]).to(xj.dtype)  # (P, T)
            acc = tl.dot(dyr, xw, acc, input_precision=PREC)
    tl.store(dS + ((block + tile) * QT + column) * (T * T) + i * T + j, acc.to(dS.dtype.element_ty))
    mirror = ((block + other) * QT + (tile - first)) * (T * T)
    tl.store(dST + mirror + j * T + i, acc.to(dST.dtype.element_ty))


@triton.jit
def bc_grads_kernel(
    x,  # (B, L, H, P)
    dy,  # (B, L, H, P) contiguous
    B_f,  # (B, L, G, N)
    C_f,
    B_b,
    C_b,
    dS,  # (B, G * PARTS, nT, QT, T, T), summed over PARTS
    dST,
    states,  # (B, H, 2, nC, N, P)
    dstates,
    sums,  # (12, B, H, Lp) planes 2 and 8 out, where ROWS
    lf,  # (B, H, Lp)
    lb,
    cf,
    cb,
    dB_f,  # (B, L, G, N) out, common strides
    dC_f,
    dB_b,
    dC_b,
    stride_xb,
    stride_xl,
    stride_xh,
    stride_b,
    stride_l,
    stride_g,
    stride_ob,
    stride_ol,
    stride_og,
    B,
    L,
    H,
    G,
    Lp,
    nT,
    nC,
    QT,
    tiles,  # that the launch computes: all, all but the last, or, where R < T, the last
    N: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,  # rows computed of each tile; less than T only where ROWS
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,  # chunks of one tile: what C reads from states is each row's sum of G outside the tile
    HAS_START: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PREC: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    which = pid % 4  # C_f, C_b, B_f, B_b
    tile = nT - 1 if R < T else (pid // 4) % tiles
    g = (pid // (4 * tiles)) % G
    b = (pid // (4 * tiles * G)).to(tl.int64)
    direction = which % 2
    is_c = which < 2
    chunk = tile // QT
    first = chunk * QT
    last = first + QT
    t = tl.arange(0, R)
    n = tl.arange(0, N)
    p = tl.arange(0, P)
    i = t[:, None]
    j = t[None, :]
    rows = tile * T + t
    base = b * stride_b + g * stride_g
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
    block += ((b * G + g) * PARTS * nT + tile) * QT * (T * T)
    # C_f and B_b sum over the tiles before this one, C_b and B_f over those after it
    before = (direction == 0) == is_c
    low = tl.where(before, first, tile)
    high = tl.where(before, tile + 1, last)
    acc = tl.zeros((R, N), tl.float32)
    # many parts (heads whose number few divide): one after the other, for the pipeline would hold all of them at once
    for other in tl.range(low, high, num_stages=STAGES if PARTS <= 2 else 1):
        d = tl.load(block + (other - first) * (T * T) + i * T + j)  # (R, R)
        if PARTS <= 2:
            for part in tl.static_range(1, PARTS):
                d += tl.load(block + (part * nT * QT + other - first) * (T * T) + i * T + j)
        else:
            many = d.to(tl.float32)
            for part in tl.range(1, PARTS, num_stages=1):
                many += tl.load(block + (part * nT * QT + other - first) * (T * T) + i * T + j).to(tl.float32)
            d = many.to(d.dtype)
        keep = tl.where(before, other * T + j < tile * T + i, other * T + j > tile * T + i)  # (R, R)
        v = load_rows(source + base, other * T + t + source_shift, n, stride_l, L)  # (R, N)
        acc = tl.dot(tl.where(keep, d, 0.0).to(d.dtype), v.to(d.dtype), acc, input_precision=PREC)
    if HAS_STATE:
        # C sums dY over its states, B sums X over the gradients of theirs: the same loop with other operands
        l_all = lf if direction == 0 else lb
        e_all = l_all
        near = t + shift
        st_all = states
        v_all = dy + b * L * H * P
        stride_vl = H * P
        stride_vh = P
        sign = 1.0
        if not is_c:
            e_all = cf if direction == 0 else cb
            near = t
            st_all = dstates
            v_all = x + b * stride_xb
            stride_vl = stride_xl
            stride_vh = stride_xh
            sign = -1.0
        near_ok = (near >= 0) & (near < T)
        far = tl.where(direction == 0, T - 1, 0)
        plane = tl.cast(B, tl.int64) * H * Lp
        absent = tl.where(before, 0, nC - 1)
        if HAS_START:
            absent = tl.where(is_c, -1, absent)
        present = (chunk + tl.zeros_like(n) != absent)[:, None]  # (N, 1): no state enters the first chunk
        if ROWS:
            own = load_rows((C_f if direction == 0 else C_b) + base, rows + shift, n, stride_l, L).to(
                tl.float32
            )  # (R, N)
        for k in tl.range(0, H // G, num_stages=STAGES):
            h = g * (H // G) + k
            head = (b * H + h) * Lp
            st_ptr = st_all + (((b * H + h) * 2 + direction) * nC + chunk) * (N * P)
            st = tl.trans(tl.load(st_ptr + n[:, None] * P + p[None, :], mask=present, other=0.0))  # (P, N)
            v = load_rows(v_all + h * stride_vh, rows, p, stride_vl, L)  # (R, P)
            e = tl.load(e_all + head + tile * T + near, mask=near_ok, other=0.0)  # (R,)
            span = tl.load(l_all + head + tile * T + far)
            if is_c:
                span = tl.zeros((), lf.dtype.element_ty)
            if not ROWS:
                # from the chunk's edge on the far side of the state to this tile's edge
                for between in range(tl.where(before, first, tile + 1), tl.where(before, tile, last)):
                    span += tl.load(l_all + head + between * T + far)
            w = tl.exp2((sign * e + span).to(tl.float32))  # (R,)
            vw = (v.to(tl.float32) * w[:, None]).to(st.dtype)
            if ROWS:
                share = tl.dot(vw, st, input_precision=PREC)  # (R, N)
                acc += share
                if is_c:
                    tl.store(sums + (2 + 6 * direction) * plane + (b * H + h) * Lp + rows, tl.sum(share * own, axis=1))
            else:
                acc = tl.dot(vw, st, acc, input_precision=PREC)
    out = target + b * stride_ob + g * stride_og + n[None, :]
    to = rows + tl.where(is_c, shift, 0)
    keep_rows = (to >= 0) & (to < L) & (rows < L)
    tl.store(out + to[:, None].to(tl.int64) * stride_ol, acc.to(target.dtype.element_ty), mask=keep_rows[:, None])
    # nothing reads C_f of the last token and C_b of the first
    if is_c:
        unread = L - 1
        mine = tile == nT - 1
        if direction == 1:
            unread = 0
            mine = tile == 0
        if mine:
            tl.store(out + unread * stride_ol.to(tl.int64), tl.zeros((1, N), tl.float32).to(target.dtype.element_ty))
