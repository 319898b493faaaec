"""Scores shared by the heads of a group: S[i, j] = C_f[i-1] . B_f[j] below the diagonal, C_b[i+1] . B_b[j] above it.

Inside a tile only, (B, G, nT, T, T): between tiles there are states. The transposed product is formed directly, never
by transposing a computed operand.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, rows, cols, stride_l, L):
    """(T, W) tile, zero where the row is outside the sequence."""
    mask = (rows >= 0) & (rows < L)
    return tl.load(ptr + rows[:, None].to(tl.int64) * stride_l + cols[None, :], mask=mask[:, None], other=0.0)


@triton.jit
def load_cols(ptr, rows, cols, stride_l, L):
    """(W, T) tile: the same rows of memory as ``load_rows``, transposed."""
    mask = (rows >= 0) & (rows < L)
    return tl.load(ptr + rows[None, :].to(tl.int64) * stride_l + cols[:, None], mask=mask[None, :], other=0.0)


@triton.jit
def scores_kernel(
    B_f,  # (B, L, G, N), common strides, last one 1
    C_f,
    B_b,
    C_b,
    S,  # (B, G, nT, T, T) out
    stride_b,
    stride_l,
    stride_g,
    L,
    G,
    nT,
    N: tl.constexpr,
    T: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PREC: tl.constexpr,
):
    pid = tl.program_id(0)
    tile = pid % nT
    g = (pid // nT) % G
    b = (pid // (nT * G)).to(tl.int64)
    base = b * stride_b + g * stride_g
    t = tl.arange(0, T)
    n = tl.arange(0, N)
    rows = tile * T + t
    out = S + ((b * G + g) * nT + tile) * (T * T) + t[:, None] * T + t[None, :]  # (T, T)
    # f: the pair (i > j), b: (i < j). Row operand (T, N), column operand (N, T).
    s = tl.zeros((T, T), tl.float32)
    below = t[None, :] < t[:, None]  # (T, T)
    above = t[None, :] > t[:, None]
    if TRANSPOSED:
        row = load_rows(B_f + base, rows, n, stride_l, L)  # j
        col = load_cols(C_f + base, rows - 1, n, stride_l, L)  # i
        s += tl.where(above, tl.dot(row, col, input_precision=PREC), 0.0)
        row = load_rows(B_b + base, rows, n, stride_l, L)
        col = load_cols(C_b + base, rows + 1, n, stride_l, L)
        s += tl.where(below, tl.dot(row, col, input_precision=PREC), 0.0)
    else:
        row = load_rows(C_f + base, rows - 1, n, stride_l, L)  # i
        col = load_cols(B_f + base, rows, n, stride_l, L)  # j
        s += tl.where(below, tl.dot(row, col, input_precision=PREC), 0.0)
        row = load_rows(C_b + base, rows + 1, n, stride_l, L)
        col = load_cols(B_b + base, rows, n, stride_l, L)
        s += tl.where(above, tl.dot(row, col, input_precision=PREC), 0.0)
    # rows of padding would read C beyond their own token: row L pairs C_f[L-1] with nothing
    s = tl.where((rows < L)[:, None] & (rows < L)[None, :], s, 0.0)
    tl.store(out, s.to(S.dtype.element_ty))
