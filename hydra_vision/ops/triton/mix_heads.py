"""y = M x in tiles, with states between them: one program a (tile, heads of a group, batch), looping over the heads.

Scores and C are read once for all heads of the program, and the loop lets the compiler fetch the next head's X and
states while this one is computed.
"""

import triton
import triton.language as tl

from .scores import load_rows


@triton.jit
def load_state(ptr, N: tl.constexpr, P: tl.constexpr, tile, absent):
    """(N, P) state; zero, and no traffic, at the tile ``absent``, which no state enters."""
    n = tl.arange(0, N)
    present = tile + tl.zeros_like(n) != absent  # (N,)
    return tl.load(ptr + n[:, None] * P + tl.arange(0, P)[None, :], mask=present[:, None], other=0.0)


@triton.jit(do_not_specialize=['H'])
def mix_heads_kernel(
    x,  # (B, L, H, P)
    S,  # (B, G, nT, T, T)
    C_f,  # (B, L, G, N)
    C_b,
    states,  # (B, H, 2, nT, N, P)
    lf,  # (B, H, Lp)
    lb,
    cf,
    cb,
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
    tiles,  # that the launch computes: all, all but the last, or, where R < T, the last
    HG: tl.constexpr,  # heads a program, divides H / G
    N: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,  # rows computed of each tile, less than T where that is all that the last one has
    DIAGONAL: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_START: tl.constexpr,
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
    i = t[:, None]
    j = t[None, :]
    rows = tile * T + t
    s = tl.load(S + ((b * G + g) * nT + tile) * (T * T) + i * T + j)  # (R, R)
    wide: tl.constexpr = states.dtype.element_ty
    if HAS_STATE:
        c_off = b * stride_cb + g * stride_cg
        c_f = load_rows(C_f + c_off, rows - 1, n, stride_cl, L).to(wide)  # (R, N)
        c_b = load_rows(C_b + c_off, rows + 1, n, stride_cl, L).to(wide)
        left_end = -1 if HAS_START else 0
        right_end = -1 if HAS_START else nT - 1
    turns = HG if HG > 1 else H // (H // HG)  # never a constant 1, see NOTES.md: compilers
    for k in tl.range(0, turns, num_stages=STAGES):
        h = h0 + k
        head = (b * H + h) * Lp + tile * T
        xi = load_rows(x + b * stride_xb + h * stride_xh, rows, p, stride_xl, L)  # (R, P)
        row_f = tl.load(lf + head + t - 1, mask=t > 0, other=0.0)  # (R,)
        row_b = tl.load(lb + head + t + 1, mask=t < T - 1, other=0.0)
        col_f = tl.load(cf + head + t)
        col_b = tl.load(cb + head + t)
        d = tl.zeros((R,), tl.float32)
        if DIAGONAL == 1:
            d += tl.load(diag + h)
        if DIAGONAL == 2:
            d = tl.load(diag + (b * H + h) * L + rows, mask=rows < L, other=0.0)
        acc = tl.zeros((R, P), tl.float32)
        if HAS_STATE:
            st_ptr = states + ((b * H + h) * 2 * nT + tile) * (N * P)
            st = load_state(st_ptr, N, P, tile, left_end)
            acc = tl.dot(c_f, st, input_precision=PREC) * tl.exp2(row_f.to(tl.float32))[:, None]
            st = load_state(st_ptr + nT * (N * P), N, P, tile, right_end)
            acc += tl.dot(c_b, st, input_precision=PREC) * tl.exp2(row_b.to(tl.float32))[:, None]
        e = tl.where(i > j, row_f[:, None] - col_f[None, :], row_b[:, None] - col_b[None, :])  # (R, R)
        m = tl.where(i == j, d[:, None], s.to(tl.float32) * tl.exp2(e.to(tl.float32)))
        acc = tl.dot(m.to(xi.dtype), xi, acc, input_precision=PREC)
        out = y + ((b * L + rows[:, None]) * H + h) * P + p[None, :]
        tl.store(out, acc.to(y.dtype.element_ty), mask=(rows < L)[:, None])
