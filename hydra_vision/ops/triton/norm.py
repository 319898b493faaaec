"""out = RMSNorm(y) * w * SiLU(z) over all of d_inner, and its backward. One row a program; backward loops over rows
and adds the diagonal's gradient, which needs whole rows too. And the sums of the shares of parameters' gradients.

Where the dtype has float32's range (bfloat16, float32), out overwrites y and is all that the backward keeps: out_proj
keeps it anyway, and RMSNorm(y) = out / (w * SiLU(z)) to the rounding of out. A factor smaller than TINY counts as TINY,
so that the quotient exists; the product is nothing beside any other number then.
"""

# ruff: noqa: RUF005  (Triton unpacks no tuples)

import triton
import triton.language as tl

from .conv import sigmoid

TINY = tl.constexpr(1e-30)


@triton.jit
def _gate(z, w, KEEPS: tl.constexpr):
    """(DB,) w * SiLU(z), kept away from zero where it will be divided by."""
    factor = w * (z * tl.sigmoid(z))
    if KEEPS:
        factor = tl.where(tl.abs(factor) < TINY, TINY, factor)
    return factor


@triton.jit
def norm_gate_kernel(
    y,  # (B, L, D) contiguous
    z,  # (B, L, D), rows of any stride
    w,  # (D,)
    out,  # (B, L, D) contiguous; may be y
    rstd,  # (B * L,) float32, out
    stride_zb,
    stride_zl,
    L,
    D,
    EPS,
    DB: tl.constexpr,
    KEEPS: tl.constexpr,  # y can be had back from out
    ALIGN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b = row // L
    l = row % L
    d = tl.arange(0, DB)
    ok = d < D
    yv = tl.load(y + row * D + d, mask=ok, other=0.0).to(tl.float32)  # (DB,)
    start = tl.multiple_of(b * stride_zb + l * stride_zl, ALIGN)
    zv = tl.load(z + start + d, mask=ok, other=0.0).to(tl.float32)
    wv = tl.load(w + d, mask=ok, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(yv * yv, axis=0) / D + EPS)
    tl.store(rstd + row, r)
    o = yv * r * _gate(zv, wv, KEEPS)
    tl.store(out + row * D + d, o.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _quotient(y, x, FAST: tl.constexpr):
    """y / x; FAST: by a reciprocal to one unit of float32 rounding (not in the interpreter)."""
    if FAST:
        return y * tl.inline_asm_elementwise(
            'rcp.approx.ftz.f32 $0, $1;', '=f,f', [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return y / x


@triton.jit
def _row_of_each(y, z, g, x, row, end, stride_zb, stride_zl, stride_xl, L, D, d, ok, ALIGN: tl.constexpr):
    """(W,) a piece of one row of y, z, the gradient and x; zero from row ``end`` on."""
    here = ok & (d * 0 + row < end)
    start = tl.multiple_of(row // L * stride_zb + row % L * stride_zl, ALIGN)
    y_row = tl.load(y + row * D + d, mask=here, other=0.0)
    z_row = tl.load(z + start + d, mask=here, other=0.0)
    g_row = tl.load(g + row * D + d, mask=here, other=0.0)
    x_row = tl.load(x + row * stride_xl + d, mask=here, other=0.0)
    return y_row, z_row, g_row, x_row


@triton.jit
def norm_gate_backward_kernel(
    dout,  # (B, L, D) contiguous
    y,  # (B, L, D) contiguous; where KEEPS, what the forward wrote instead of it
    z,
    w,
    rstd,
    x,  # (B, L, >= D) rows of stride_xl: what the diagonal multiplies
    dy,  # (B, L, D) contiguous, out
    ddiag,  # (B, L, H) float32, out: sum over a head of dy * x
    dz,  # (B, L, D) rows of any stride, out
    part_w,  # (programs, D) float32, out
    part_D,  # (programs, H) float32, out: sums of ddiag
    stride_zb,
    stride_zl,
    stride_gb,
    stride_gl,
    stride_xl,
    L,
    D,
    ROWS,
    PER,  # rows a program
    P: tl.constexpr,
    W: tl.constexpr,  # channels of a piece
    PIECES: tl.constexpr,
    KEEPS: tl.constexpr,
    LATE: tl.constexpr,  # y is not divided by the norm yet, and dout has its factor rstd already (chunks.py)
    FAST: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_G: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, W)
    h = tl.arange(0, W // P)
    begin = pid * PER
    end = tl.minimum(begin + PER, ROWS)
    weights, dw, dD, rows = (), (), (), ()
    for k in tl.static_range(PIECES):
        ok = k * W + d < D
        weights = weights + (tl.load(w + k * W + d, mask=ok, other=0.0).to(tl.float32),)  # (W,)
        dw = dw + (tl.zeros((W,), tl.float32),)
        dD = dD + (tl.zeros((W // P,), tl.float32),)
        rows = rows + (
            _row_of_each(y, z, dout, x, begin, end, stride_zb, stride_zl, stride_xl, L, D, k * W + d, ok, ALIGN),
        )
    for row in range(begin, end):
        now = rows
        # the next row is on its way while this one is reduced
        rows = ()
        for k in tl.static_range(PIECES):
            ok = k * W + d < D
            rows = rows + (
                _row_of_each(y, z, dout, x, row + 1, end, stride_zb, stride_zl, stride_xl, L, D, k * W + d, ok, ALIGN),
            )
        r = tl.load(rstd + row)
        scale = 1.0
        if LATE:
            scale = 1.0 / r
        hats, dhats = (), ()
        along = 0.0  # sum of dhat * hat
        to = tl.multiple_of(row // L * stride_gb + row % L * stride_gl, ALIGN_G)
        new_dw = ()
        for k in tl.static_range(PIECES):
            ok = k * W + d < D
            yv = now[k][0].to(tl.float32)  # (W,)
            zv = now[k][1].to(tl.float32)
            g = now[k][2].to(tl.float32) * scale
            wv = weights[k]
            sig = sigmoid(zv, FAST)
            gate = zv * sig
            if KEEPS:
                factor = wv * gate
                factor = tl.where(tl.abs(factor) < TINY, TINY, factor)
                hat = _quotient(yv, factor, FAST)
                if LATE:
                    hat *= r
            else:
                hat = yv * r
            gh = g * hat
            new_dw = new_dw + (dw[k] + gh * gate,)
            dzv = gh * wv * (sig * (1.0 + zv * (1.0 - sig)))
            tl.store(dz + to + k * W + d, dzv.to(dz.dtype.element_ty), mask=ok)
            dhat = g * wv * gate
            along += tl.sum(dhat * hat, axis=0)
            hats = hats + (hat,)
            dhats = dhats + (dhat,)
        dw = new_dw
        along = along / D
        new_dD = ()
        for k in tl.static_range(PIECES):
            dyv = r * (dhats[k] - hats[k] * along)
            tl.store(dy + row * D + k * W + d, dyv.to(dy.dtype.element_ty), mask=k * W + d < D)
            per_head = tl.sum(tl.reshape(dyv * now[k][3].to(tl.float32), (W // P, P)), axis=1)  # (W / P,)
            tl.store(ddiag + row * (D // P) + k * (W // P) + h, per_head, mask=k * (W // P) + h < D // P)
            new_dD = new_dD + (dD[k] + per_head,)
        dD = new_dD
    for k in tl.static_range(PIECES):
        tl.store(part_w + pid * D + k * W + d, dw[k], mask=k * W + d < D)
        tl.store(part_D + pid * (D // P) + k * (W // P) + h, dD[k], mask=k * (W // P) + h < D // P)


@triton.jit
def _sum_rows(part, rows, columns, block, BR: tl.constexpr, BC: tl.constexpr):
    """(BC,) sums over the rows of part (rows, columns) of a block of columns."""
    c = block * BC + tl.arange(0, BC)
    r = tl.arange(0, BR)
    acc = tl.zeros((BR, BC), tl.float32)
    for first in range(0, rows, BR):
        at = part + (first + r)[:, None].to(tl.int64) * columns + c[None, :]
        acc += tl.load(at, mask=(first + r < rows)[:, None] & (c < columns)[None, :], other=0.0)
    return tl.sum(acc, axis=0)


@triton.jit
def sum_parts_kernel(
    conv,  # (conv_rows, K + 1, C) float32: of the convolution's weight, and of its bias
    weight,  # (norm_rows, D): of the norm's weight
    diag,  # (norm_rows, H): of D
    decay,  # (2, decay_rows, H): of A_log and of dt_bias
    dconv,  # (C, K) float32 out
    dbias,  # (C,) float32 out
    dweight,  # (D,) float32 out
    ddiag,  # (H,) float32 out; also of A_log and of dt_bias
    dA_log,
    ddt_bias,
    conv_rows,
    norm_rows,
    decay_rows,
    C,
    D,
    H,
    K: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Gradients of parameters, added up from the shares of the programs that made them."""
    block = tl.program_id(0)
    c = tl.arange(0, BC)
    width = (K + 1) * C
    blocks = tl.cdiv(width, BC)
    if block < blocks:
        total = _sum_rows(conv, conv_rows, width, block, BR, BC)
        c += block * BC
        tl.store(dconv + c % C * K + c // C, total, mask=c < K * C)  # a tap a row there, a tap a column here
        tl.store(dbias + c - K * C, total, mask=(c >= K * C) & (c < width))
    else:
        block -= blocks
        blocks = tl.cdiv(D, BC)
        if block < blocks:
            total = _sum_rows(weight, norm_rows, D, block, BR, BC)
            tl.store(dweight + block * BC + c, total, mask=block * BC + c < D)
        else:
            block -= blocks
            blocks = tl.cdiv(H, BC)
            which = block // blocks
            block = block % blocks
            c += block * BC
            if which == 0:
                tl.store(ddiag + c, _sum_rows(diag, norm_rows, H, block, BR, BC), mask=c < H)
            elif which == 1:
                tl.store(dA_log + c, _sum_rows(decay, decay_rows, H, block, BR, BC), mask=c < H)
            else:
                part = decay + tl.cast(decay_rows, tl.int64) * H
                tl.store(ddt_bias + c, _sum_rows(part, decay_rows, H, block, BR, BC), mask=c < H)
