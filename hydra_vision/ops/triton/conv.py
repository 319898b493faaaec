"""Depthwise same-padded convolution + SiLU over [x, B, C] with the diagonal fc_D(x) + D, and its backward.

Programs cover all channels of a tile of tokens, so that the diagonal's product over d_inner needs no second pass.
"""

import triton
import triton.language as tl


@triton.jit
def _convolve(u, w, bias, rows, cols, stride_l, L, C, K: tl.constexpr, HAS_BIAS: tl.constexpr, ALIGN: tl.constexpr):
    """(TL, BC) float32: the convolution before its activation."""
    ok = cols < C
    acc = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=ok, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(K):
        near = rows + (k - K // 2)
        mask = ((near >= 0) & (near < L))[:, None] & ok[None, :]
        start = tl.multiple_of(near.to(tl.int64) * stride_l, ALIGN)  # (TL,)
        v = tl.load(u + start[:, None] + cols[None, :], mask=mask, other=0.0)  # (TL, BC)
        acc += v.to(tl.float32) * tl.load(w + cols * K + k, mask=ok, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def conv_kernel(
    u,  # (B, L, C) rows of any stride: x, B, C before the convolution
    w,  # (C, K)
    bias,  # (C,)
    fc,  # (H, d_inner)
    D,  # (H,)
    out,  # (B, L, C) contiguous
    diag,  # (B, H, Lp) float32, out
    stride_b,
    stride_l,
    L,
    C,
    INNER,
    H,
    Lp,
    K: tl.constexpr,
    HB: tl.constexpr,
    TL: tl.constexpr,
    BC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALIGN: tl.constexpr,
    PREC: tl.constexpr,
):
    tiles = tl.cdiv(L, TL)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.program_id(0) % tiles) * TL + tl.arange(0, TL)
    heads = tl.arange(0, HB)
    u_b = u + b * stride_b
    acc_d = tl.zeros((TL, HB), tl.float32)
    blocks = tl.cdiv(INNER, BC)
    for block in range(0, tl.cdiv(C, BC)):
        cols = block * BC + tl.arange(0, BC)
        pre = _convolve(u_b, w, bias, rows, cols, stride_l, L, C, K, HAS_BIAS, ALIGN)  # (TL, BC)
        act = (pre * tl.sigmoid(pre)).to(out.dtype.element_ty)
        to = out + (b * L + rows[:, None]) * C + cols[None, :]
        tl.store(to, act, mask=(rows < L)[:, None] & (cols < C)[None, :])
        if block < blocks:
            f = tl.load(
                fc + heads[None, :] * INNER + cols[:, None], mask=(heads < H)[None, :] & (cols < INNER)[:, None], other=0.0
            )  # (BC, HB)
            acc_d = tl.dot(act, f.to(act.dtype), acc_d, input_precision=PREC)
    acc_d += tl.load(D + heads, mask=heads < H, other=0.0).to(tl.float32)[None, :]
    tl.store(diag + (b * H + heads[None, :]) * Lp + rows[:, None], acc_d, mask=(rows < Lp)[:, None] & (heads < H)[None, :])


@triton.jit
def conv_activation_backward_kernel(
    u,  # (B, L, C) rows of any stride
    w,
    bias,
    fc,  # (H, d_inner)
    ddiag,  # (B, L, H) float32
    g,  # (B, L, C) contiguous: in, gradient after the activation; out, before it
    stride_b,
    stride_l,
    L,
    C,
    INNER,
    H,
    K: tl.constexpr,
    HB: tl.constexpr,
    TL: tl.constexpr,
    BC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALIGN: tl.constexpr,
    PREC: tl.constexpr,
):
    tiles = tl.cdiv(L, TL)
    blocks = tl.cdiv(C, BC)
    block = tl.program_id(0) % blocks
    b = (tl.program_id(0) // (blocks * tiles)).to(tl.int64)
    rows = ((tl.program_id(0) // blocks) % tiles) * TL + tl.arange(0, TL)
    cols = block * BC + tl.arange(0, BC)
    heads = tl.arange(0, HB)
    pre = _convolve(u + b * stride_b, w, bias, rows, cols, stride_l, L, C, K, HAS_BIAS, ALIGN)  # (TL, BC)
    at = g + (b * L + rows[:, None]) * C + cols[None, :]
    keep = (rows < L)[:, None] & (cols < C)[None, :]
    grad = tl.load(at, mask=keep, other=0.0).to(tl.float32)
    if block * BC < INNER:
        d = tl.load(
            ddiag + (b * L + rows[:, None]) * H + heads[None, :], mask=(rows < L)[:, None] & (heads < H)[None, :], other=0.0
        )  # (TL, HB)
        f = tl.load(
            fc + heads[:, None] * INNER + cols[None, :], mask=(heads < H)[:, None] & (cols < INNER)[None, :], other=0.0
        )  # (HB, BC)
        dt: tl.constexpr = tl.bfloat16 if u.dtype.element_ty == tl.bfloat16 else tl.float32
        grad = tl.dot(d.to(dt), f.to(dt), grad, input_precision=PREC)
    sig = tl.sigmoid(pre)
    grad = grad * (sig * (1.0 + pre * (1.0 - sig)))
    tl.store(at, grad.to(g.dtype.element_ty), mask=keep)


@triton.jit
def conv_backward_kernel(
    u,  # (B, L, C) rows of any stride
    w,
    g,  # (B, L, C) contiguous: gradient before the activation
    du,  # (B, L, C) rows of any stride, out
    part,  # (B, tiles, K + 1, C) float32, out: weight and bias gradients of the tile
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
        mask = ((near >= 0) & (near < L))[:, None] & ok[None, :]
        at = tl.multiple_of(near.to(tl.int64) * stride_l, ALIGN)
        uv = tl.load(u_b + at[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)  # (TL, BC)
        tl.store(slot + k * C, tl.sum(gv * uv, axis=0), mask=ok)
        far = rows - (k - K // 2)
        mask = ((far >= 0) & (far < L))[:, None] & ok[None, :]
        gk = tl.load(g_b + far[:, None].to(tl.int64) * C + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += gk * tl.load(w + cols * K + k, mask=ok, other=0.0).to(tl.float32)[None, :]
    tl.store(slot + K * C, tl.sum(gv, axis=0), mask=ok)
    to = tl.multiple_of(rows.to(tl.int64) * stride_dl, ALIGN_D)
    tl.store(du + b * stride_db + to[:, None] + cols[None, :], acc.to(du.dtype.element_ty), mask=here)
