"""out = RMSNorm(y) * w * SiLU(z) over all of d_inner, and its backward. One row a program; backward loops over rows
and adds the diagonal's gradient, which needs whole rows too.

Where the dtype has float32's range (bfloat16, float32), out overwrites y and is all that the backward keeps: out_proj
keeps it anyway, and RMSNorm(y) = out / (w * SiLU(z)) to the rounding of out. A factor smaller than TINY counts as TINY,
so that the quotient exists; the product is nothing beside any other number then.
"""

import triton
import triton.language as tl

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
def _row_of_each(y, z, g, x, row, end, stride_zb, stride_zl, stride_xl, L, D, d, ok, ALIGN: tl.constexpr):
    """(DB,) one row of y, z, the gradient and x; zero from row ``end`` on."""
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
    DB: tl.constexpr,
    KEEPS: tl.constexpr,
    LATE: tl.constexpr,  # y is not divided by the norm yet, and dout has its factor rstd already (chunks.py)
    ALIGN: tl.constexpr,
    ALIGN_G: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DB)
    ok = d < D
    wv = tl.load(w + d, mask=ok, other=0.0).to(tl.float32)  # (DB,)
    dw = tl.zeros((DB,), tl.float32)
    begin = pid * PER
    end = tl.minimum(begin + PER, ROWS)
    y_next, z_next, g_next, x_next = _row_of_each(
        y, z, dout, x, begin, end, stride_zb, stride_zl, stride_xl, L, D, d, ok, ALIGN
    )
    for row in range(begin, end):
        yv = y_next.to(tl.float32)  # (DB,)
        zv = z_next.to(tl.float32)
        g = g_next.to(tl.float32)
        xv = x_next.to(tl.float32)
        # the next row is on its way while this one is reduced
        y_next, z_next, g_next, x_next = _row_of_each(
            y, z, dout, x, row + 1, end, stride_zb, stride_zl, stride_xl, L, D, d, ok, ALIGN
        )
        r = tl.load(rstd + row)
        if LATE:
            yv *= r
            g /= r
        sig = tl.sigmoid(zv)
        gate = zv * sig
        if KEEPS:
            hat = yv / _gate(zv, wv, KEEPS)
        else:
            hat = yv * r
        dhat = g * wv * gate
        gh = g * hat
        dw += gh * gate
        dzv = gh * wv * (sig * (1.0 + zv * (1.0 - sig)))
        dyv = r * (dhat - hat * (tl.sum(dhat * hat, axis=0) / D))
        tl.store(dy + row * D + d, dyv.to(dy.dtype.element_ty), mask=ok)
        per_head = tl.sum(tl.reshape(dyv * xv, (DB // P, P)), axis=1)  # (DB / P,)
        h = tl.arange(0, DB // P)
        tl.store(ddiag + row * (D // P) + h, per_head, mask=h < D // P)
        to = tl.multiple_of(row // L * stride_gb + row % L * stride_gl, ALIGN_G)
        tl.store(dz + to + d, dzv.to(dz.dtype.element_ty), mask=ok)
    tl.store(part_w + pid * D + d, dw, mask=ok)
