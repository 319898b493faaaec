"""Backward in tiles: dX; the scores' gradient and the sums of G, looping over the heads of a group; then dB and dC.

In the first two everything is kept transposed, (j, i): M^T for dX, dM^T and G^T for the sums. Rows that come from
states are summed where C's gradient is formed. No atomics; each output element belongs to one program.
"""

import triton
import triton.language as tl

from .mix_heads import load_state
from .scores import load_rows


@triton.jit(do_not_specialize=['H'])
def dx_heads_kernel(
    x,  # (B, L, H, P)
    dy,  # (B, L, H, P) contiguous
    ST,  # (B, G, nT, T, T)
    B_f,  # (B, L, G, N)
    B_b,
    dstates,  # (B, H, 2, nT, N, P)
    lf,  # (B, H, Lp)
    lb,
    cf,
    cb,
    diag,  # (B, H, L) float32, or (H,), or None
    ddiag,  # (B, L, H) float32: out, or, where FC, in
    fc,  # (H, H * P), where FC
    sums,  # (planes, B, H, Lp), planes 6 and 7 out, where HAS_STATE
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
    tiles,  # that the launch computes: all, all but the last, or, where R < T, the last
    HG: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,  # rows computed of each tile
    DIAGONAL: tl.constexpr,
    FC: tl.constexpr,
    HB: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PREC: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    tile = nT - 1 if R < T else pid % tiles
    h0 = (pid // tiles) % (H // HG) * HG
    b = (pid // (tiles * (H // HG))).to(tl.int64)
    g = h0 // (H // G)
    t = tl.arange(0, R)
    p = tl.arange(0, P)
    n = tl.arange(0, N)
    j = t[:, None]
    i = t[None, :]
    rows = tile * T + t
    seen = rows < L
    plane = tl.cast(B, tl.int64) * H * Lp
    s = tl.load(ST + ((b * G + g) * nT + tile) * (T * T) + j * T + i)  # (R, R), [j, i]
    wide: tl.constexpr = dstates.dtype.element_ty
    product: tl.constexpr = tl.bfloat16 if dy.dtype.element_ty == tl.bfloat16 else tl.float32
    if HAS_STATE:
        b_off = b * stride_bb + g * stride_bg
        b_f = load_rows(B_f + b_off, rows, n, stride_bl, L).to(wide)  # (R, N)
        b_b = load_rows(B_b + b_off, rows, n, stride_bl, L).to(wide)
    if FC and HB * P <= 4096:
        hh = tl.arange(0, HB)
        some = hh < H
        dd = tl.load(ddiag + (b * L + rows)[:, None] * H + hh[None, :], mask=seen[:, None] & some[None, :], other=0.0)
        dd = dd.to(product)  # (R, HB)
    turns = HG if HG > 1 else H // (H // HG)  # never a constant 1, see NOTES.md: compilers
    for k in tl.range(0, turns, num_stages=STAGES):
        h = h0 + k
        head = (b * H + h) * Lp + tile * T
        dyj = load_rows(dy + (b * L * H + h) * P, rows, p, H * P, L)  # (R, P)
        row_f = tl.load(lf + head + t - 1, mask=t > 0, other=0.0)  # (R,)
        row_b = tl.load(lb + head + t + 1, mask=t < T - 1, other=0.0)
        col_f = tl.load(cf + head + t)
        col_b = tl.load(cb + head + t)
        acc = tl.zeros((R, P), tl.float32)
        if HAS_STATE:
            xj = load_rows(x + b * stride_xb + h * stride_xh, rows, p, stride_xl, L).to(tl.float32)  # (R, P)
            ds_ptr = dstates + ((b * H + h) * 2 * nT + tile) * (N * P)
            ds = load_state(ds_ptr, N, P, tile, nT - 1)
            total = tl.load(lf + head + T - 1)
            acc = tl.dot(b_f, ds, input_precision=PREC) * tl.exp2((total - col_f).to(tl.float32))[:, None]  # (R, P)
            tl.store(sums + head + t + 6 * plane, tl.sum(acc * xj, axis=1))
            ds = load_state(ds_ptr + nT * (N * P), N, P, tile, 0)
            total = tl.load(lb + head)
            u = tl.dot(b_b, ds, input_precision=PREC) * tl.exp2((total - col_b).to(tl.float32))[:, None]
            tl.store(sums + head + t + 7 * plane, tl.sum(u * xj, axis=1))
            acc += u
        e = tl.where(i > j, row_f[None, :] - col_f[:, None], row_b[None, :] - col_b[:, None])  # (R, R)
        m = tl.where(i == j, 0.0, s.to(tl.float32) * tl.exp2(e.to(tl.float32)))
        if DIAGONAL == 1:
            m = tl.where(i == j, tl.load(diag + h), m)
        if DIAGONAL == 2:
            m = tl.where(i == j, tl.load(diag + (b * H + h) * L + rows, mask=seen, other=0.0)[:, None], m)
        acc = tl.dot(m.to(dyj.dtype), dyj, acc, input_precision=PREC)
        if FC and HB * P > 4096:  # all heads at once would need more shared memory than consumer cards have
            for start in tl.range(0, HB, 64, num_stages=1):
                hs = start + tl.arange(0, 64)
                these = hs < H
                di = tl.load(
                    ddiag + (b * L + rows)[:, None] * H + hs[None, :],
                    mask=seen[:, None] & these[None, :],
                    other=0.0,
                )  # (R, 64)
                fi = tl.load(fc + hs[:, None] * (H * P) + h * P + p[None, :], mask=these[:, None], other=0.0)  # (64, P)
                acc = tl.dot(di.to(product), fi.to(product), acc, input_precision=PREC)
        elif FC:
            f = tl.load(fc + hh[:, None] * (H * P) + h * P + p[None, :], mask=some[:, None], other=0.0)  # (HB, P)
            acc = tl.dot(dd, f.to(product), acc, input_precision=PREC)
        elif DIAGONAL != 0:
            xd = load_rows(x + b * stride_xb + h * stride_xh, rows, p, stride_xl, L).to(tl.float32)  # (R, P)
            tl.store(ddiag + (b * L + rows) * H + h, tl.sum(dyj.to(tl.float32) * xd, axis=1), mask=seen)
        to = dx + b * stride_db + h * stride_dh + rows[:, None].to(tl.int64) * stride_dl + p[None, :]
        tl.store(to, acc.to(dx.dtype.element_ty), mask=seen[:, None])


@triton.jit(do_not_specialize=['H'])
def scores_heads_kernel(
    x,  # (B, L, H, P)
    dy,  # (B, L, H, P) contiguous
    ST,  # (B, G, nT, T, T)
    lf,  # (B, H, Lp)
    lb,
    cf,
    cb,
    sums,  # (planes, B, H, Lp), planes 0 to 3 out; 8 and 9 where EXACT
    dS,  # (B, H / HG, nT, T, T) out, partial sums over the heads of the program
    dST,
    stride_xb,
    stride_xl,
    stride_xh,
    B,
    L,
    H,
    G,
    Lp,
    nT,
    tiles,  # that the launch computes: all, all but the last, or, where R < T, the last
    HG: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,  # rows computed of each tile
    EXACT: tl.constexpr,  # leave neighbours out of the sums for the decays: nothing lies between them
    PREC: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    tile = nT - 1 if R < T else pid % tiles
    h0 = (pid // tiles) % (H // HG) * HG
    b = (pid // (tiles * (H // HG))).to(tl.int64)
    g = h0 // (H // G)
    t = tl.arange(0, R)
    p = tl.arange(0, P)
    j = t[:, None]
    i = t[None, :]
    rows = tile * T + t
    plane = tl.cast(B, tl.int64) * H * Lp
    s = tl.load(ST + ((b * G + g) * nT + tile) * (T * T) + j * T + i)  # (R, R), [j, i]
    dscores = tl.zeros((R, R), tl.float32)
    turns = HG if HG > 1 else H // (H // HG)  # never a constant 1, see NOTES.md: compilers
    for k in tl.range(0, turns, num_stages=STAGES):
        h = h0 + k
        head = (b * H + h) * Lp + tile * T
        xj = load_rows(x + b * stride_xb + h * stride_xh, rows, p, stride_xl, L)  # (R, P)
        dyj = load_rows(dy + (b * L * H + h) * P, rows, p, H * P, L)  # (R, P)
        row_f = tl.load(lf + head + t - 1, mask=t > 0, other=0.0)  # (R,)
        row_b = tl.load(lb + head + t + 1, mask=t < T - 1, other=0.0)
        col_f = tl.load(cf + head + t)
        col_b = tl.load(cb + head + t)
        out = sums + head + t
        e = tl.where(i > j, row_f[None, :] - col_f[:, None], row_b[None, :] - col_b[:, None])  # (R, R)
        e = tl.minimum(e.to(tl.float32), 64.0)  # the diagonal alone is not <= 0; it is dropped at the end
        grad = tl.dot(xj, tl.trans(dyj), input_precision=PREC) * tl.exp2(e)  # (R, R), dM^T o decay * dt
        dscores += grad
        grad *= s.to(tl.float32)  # G^T; s is zero on the diagonal
        lower = tl.where(i > j, grad, 0.0)
        upper = tl.where(i < j, grad, 0.0)  # not grad - lower: fused with the product it leaves the rounding behind
        if EXACT:
            tl.store(out + 8 * plane, tl.sum(lower, axis=1))
            tl.store(out + 9 * plane, tl.sum(upper, axis=1))
            lower = tl.where(i == j + 1, 0.0, lower)
            upper = tl.where(i == j - 1, 0.0, upper)
        tl.store(out, tl.sum(lower, axis=0))
        tl.store(out + 2 * plane, tl.sum(lower, axis=1))
        tl.store(out + plane, tl.sum(upper, axis=0))
        tl.store(out + 3 * plane, tl.sum(upper, axis=1))
    dscores = tl.where(i == j, 0.0, dscores)
    at = ((b * (H // HG) + h0 // HG) * nT + tile) * (T * T)
    tl.store(dST + at + j * T + i, dscores.to(dST.dtype.element_ty))
    tl.store(dS + at + i * T + j, dscores.to(dS.dtype.element_ty))


@triton.jit
def bc_grads_kernel(
    x,  # (B, L, H, P)
    dy,  # (B, L, H, P) contiguous
    B_f,  # (B, L, G, N)
    C_f,
    B_b,
    C_b,
    dS,  # (B, G * PARTS, nT, T, T), summed over PARTS
    dST,
    states,  # (B, H, 2, nT, N, P)
    dstates,
    sums,  # (planes, B, H, Lp), planes 4 and 5 out, where HAS_STATE
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
    tiles,  # that the launch computes: all, all but the last, or, where R < T, the last
    N: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,  # rows computed of each tile
    PARTS: tl.constexpr,
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
    block += ((b * G + g) * PARTS * nT + tile) * (T * T) + i * T + j
    before = (direction == 0) == is_c  # C_f and B_b sum over tokens before their own, C_b and B_f over those after it
    d = tl.load(block)  # (R, R)
    if PARTS <= 2:
        for part in tl.static_range(1, PARTS):
            d += tl.load(block + part * nT * (T * T))
    else:
        # many parts (heads whose number few divide): one after the other, a pipeline would hold all of them at once
        many = d.to(tl.float32)
        for part in tl.range(1, PARTS, num_stages=1):
            many += tl.load(block + part * nT * (T * T)).to(tl.float32)
        d = many.to(d.dtype)
    keep = tl.where(before, j < i, j > i)  # (R, R)
    u = load_rows(source + base, rows + source_shift, n, stride_l, L)  # (R, N)
    acc = tl.zeros((R, N), tl.float32)
    acc = tl.dot(tl.where(keep, d, 0.0).to(d.dtype), u.to(d.dtype), acc, input_precision=PREC)
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
        absent = tl.where(before, 0, nT - 1)
        if HAS_START:
            absent = tl.where(is_c, -1, absent)
        present = (tile + tl.zeros_like(n) != absent)[:, None]  # (N, 1): no state enters the first tile
        # what C reads from states is each row's sum of G outside the tile
        own = load_rows((C_f if direction == 0 else C_b) + base, rows + shift, n, stride_l, L).to(tl.float32)  # (R, N)
        for k in tl.range(0, H // G, num_stages=STAGES):
            h = g * (H // G) + k
            head = (b * H + h) * Lp
            st_ptr = st_all + (((b * H + h) * 2 + direction) * nT + tile) * (N * P)
            st = tl.trans(tl.load(st_ptr + n[:, None] * P + p[None, :], mask=present, other=0.0))  # (P, N)
            v = load_rows(v_all + h * stride_vh, rows, p, stride_vl, L)  # (R, P)
            e = tl.load(e_all + head + tile * T + near, mask=near_ok, other=0.0)  # (R,)
            span = tl.load(l_all + head + tile * T + far)
            if is_c:
                span = tl.zeros((), lf.dtype.element_ty)
            w = tl.exp2((sign * e + span).to(tl.float32))  # (R,)
            vw = (v.to(tl.float32) * w[:, None]).to(st.dtype)
            share = tl.dot(vw, st, input_precision=PREC)  # (R, N)
            acc += share
            if is_c:
                tl.store(sums + (4 + direction) * plane + head + rows, tl.sum(share * own, axis=1))
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
