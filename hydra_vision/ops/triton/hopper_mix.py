"""O = M V over whole chunks of a sequence, on Hopper (Gluon). The portable kernels do it in tiles, states between.

A program of one warpgroup is 64 rows of a chunk and a group of heads in turn. Its rows of the scores S stay in shared
memory for all of them, V comes by TMA, and the rows of M are built in registers:

    M[i, j] = S[i, j] * 2^(left[i] - left_col[j])    for j < i
              delta[i]                               for j = i
              S[i, j] * 2^(right[i] - right_col[j])  for j > i

For 16 x 16 blocks next to the diagonal the factor is a row factor times a column factor, both in bfloat16; exponentials
of pairs are only formed inside the 16 x 16 blocks on the diagonal. ``tables`` (chunks.py) holds the four exponents of a
head, (4, 256) float32; the transposed problem dX = M^T dY is the same kernel on S^T and the transposed table. Three
programs share a multiprocessor, two where chunks have states. All of them run the same instructions, which are few
enough for the instruction cache; a tail of up to 8 rows is a program of its own kind.

Layout of the buffers: row r of chunk c of image b is token c * ROWS + r; (B, nC, ...) arrays are chunk-major.
"""

# ruff: noqa: RUF005, SIM102  (Gluon unpacks no tuples; what is known at compile time is a condition of its own)

from typing import Any, Optional

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper import PLAIN, SIXTEEN, WHOLE, _barrier, _exp2, _flat, _mul2, _mul2_packed, _pack, _rows_of, _tanh
from .launch import launch

__all__ = ['mix_chunk_kernel', 'mix_chunks']


@gluon.jit
def _combine(s, t, r, d, m):
    """bfloat16 pairs: s * t * r where not m, d where m; r and m are int32, r packed as by ``_pack``."""
    return gl.inline_asm_elementwise(
        '{ .reg .b32 a; mul.bf16x2 a, $1, $2; mul.bf16x2 a, a, $3; lop3.b32 $0, $7, $5, a, 0xCA; }',
        '=r,r,r,r,r,r,r,r',
        [s, t, r, d, m],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=2,
    )


@gluon.constexpr_function
def _blocks(Q, NW):
    """The registers of a left operand (16 NW, 16 Q) of a product, seen as (NW, 16, Q, 16): blocks of 16 x 16."""
    reg = [[0, 0, 0, 1], [0, 8, 0, 0], [0, 0, 0, 8]] + ([[0, 0, 1, 0], [0, 0, 2, 0]] if Q == 4 else [])
    lane = [[0, 0, 0, 2], [0, 0, 0, 4], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]]
    warp = [[1 << i, 0, 0, 0] for i in range(NW.bit_length() - 1)]
    return gl.DistributedLinearLayout(reg, lane, warp, [], [NW, 16, Q, 16])


@gluon.jit
def _spread(r, Q: gl.constexpr, operand: gl.constexpr):
    """(4, 16) values of rows -> (64, 16 Q) in the layout of a left operand."""
    P4: gl.constexpr = _blocks(Q, 4)
    r = gl.expand_dims(gl.convert_layout(r, gl.SliceLayout(2, gl.SliceLayout(3, P4)), assert_trivial=True), 2)
    r = gl.reshape(gl.expand_dims(r, 3).broadcast_to([4, 16, Q, 16]), (64, 16 * Q))
    return gl.convert_layout(r, operand, assert_trivial=True)


@gluon.jit
def _tile_beside(s, t_tile, r, Q: gl.constexpr, operand: gl.constexpr):
    """(64, 16 Q) of M beside the tile on the diagonal: scores * column factors (4, Q, 16) * row factors (4, 16).

    Scores (64, 16 Q) and column factors are in shared memory.
    """
    t = gl.expand_dims(t_tile.load(gl.SliceLayout(1, _blocks(Q, 4))), 1)
    t = gl.convert_layout(gl.reshape(t.broadcast_to([4, 16, Q, 16]), (64, 16 * Q)), operand, assert_trivial=True)
    return _mul2_packed(_mul2(s.load(operand), t), _spread(r, Q, operand))


@gluon.jit
def _tile_on_diagonal(s, t_tile, rl, rr, d, operand: gl.constexpr):
    """(64, 64) of M on the diagonal.

    Args:
        s: shared memory (64, 64), scores.
        t_tile: shared memory (4, 4, 16), column factors towards each row block.
        rl: (4, 16) int32, packed row factors for columns on the left; rr: on the right.
        d: (4, 16, 16) bfloat16, the blocks on the diagonal.
    """
    P4: gl.constexpr = _blocks(4, 4)
    t = gl.reshape(gl.expand_dims(t_tile.load(gl.SliceLayout(1, P4)), 1).broadcast_to([4, 16, 4, 16]), (64, 64))
    r_layout: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, P4))
    w_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, P4)))
    q_layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, P4)))
    block = gl.expand_dims(gl.expand_dims(gl.arange(0, 4, layout=w_layout), 1), 2)  # (4, 1, 1)
    column = gl.expand_dims(gl.expand_dims(gl.arange(0, 4, layout=q_layout), 0), 1)  # (1, 1, 4)
    rl = gl.expand_dims(gl.convert_layout(rl, r_layout, assert_trivial=True), 2)
    rr = gl.expand_dims(gl.convert_layout(rr, r_layout, assert_trivial=True), 2)
    r = gl.where(block > column, rl, rr)  # (4, 16, 4)
    r = gl.reshape(gl.expand_dims(r, 3).broadcast_to([4, 16, 4, 16]), (64, 64))
    m = gl.reshape(gl.expand_dims(gl.where(block == column, -1, 0), 3).broadcast_to([4, 16, 4, 16]), (64, 64))
    d = gl.expand_dims(gl.convert_layout(d, gl.SliceLayout(2, P4), assert_trivial=True), 2)
    d = gl.reshape(d.broadcast_to([4, 16, 4, 16]), (64, 64))
    return _combine(
        s.load(operand),
        gl.convert_layout(t, operand, assert_trivial=True),
        gl.convert_layout(r, operand, assert_trivial=True),
        gl.convert_layout(d, operand, assert_trivial=True),
        gl.convert_layout(m, operand, assert_trivial=True),
    )


@gluon.jit
def _fetch_v(
    v_desc, state_desc, V, states, bar, b, row0, c, nC, h, H,
    BOXES: gl.constexpr, LEFT: gl.constexpr, HAS_STATE: gl.constexpr,
):  # fmt: skip
    """V of head h and both states."""
    BOX: gl.constexpr = v_desc.block_shape[1]
    mbarrier.expect(bar, BOXES * BOX * 128 + (16384 if HAS_STATE else 0))
    for i in gl.static_range(BOXES):
        tma.async_copy_global_to_shared(v_desc, [b, row0 + BOX * i, h * 64], bar, V.index(i))
    if HAS_STATE:
        at = ((b * H + h) * 2 * nC + c) * 64
        tma.async_copy_global_to_shared(state_desc, [at + LEFT * nC * 64, 0], bar, states.index(0))
        tma.async_copy_global_to_shared(state_desc, [at + (1 - LEFT) * nC * 64, 0], bar, states.index(1))


@gluon.jit
def _fetch_table(table_desc, table, bar, chunk, h, H):
    """The exponents of head h."""
    mbarrier.expect(bar, 4096)
    tma.async_copy_global_to_shared(table_desc, [(chunk * H + h) * 4, 0], bar, table)


@gluon.jit
def _fetch_second(z_desc, fc_desc, out, bar, b, row, h, GATE: gl.constexpr, FC: gl.constexpr):
    """What the end of head h needs, into the place where its output will be: z, or fc_D's columns."""
    if GATE:
        mbarrier.expect(bar, 8192)
        tma.async_copy_global_to_shared(z_desc, [b, row, h * 64], bar, out)
    else:
        mbarrier.expect(bar, FC * 128)
        place = out._reinterpret(gl.bfloat16, [64 // FC, FC, 64], fc_desc.layout).index(0)
        tma.async_copy_global_to_shared(fc_desc, [0, h * 64], bar, place)


@gluon.jit
def _gated(y, z, w):
    """y w SiLU(z); z bfloat16."""
    half = 0.5 * z.to(gl.float32)
    return y * w * (half + half * _tanh(half))


@gluon.jit
def _tail_program(
    v_desc, table_desc, state_desc, fc_desc, S, diag, weight, squares, ddiag, z, result,
    V, states, table, M_tail, M_last, fc_tail, output, bars, b, c, chunk, row0, h0, L, H, turns, groups, nC,
    stride_zb, stride_zl, stride_ob, stride_ol,
    ROWS: gl.constexpr, JT: gl.constexpr, BOXES: gl.constexpr, GATE: gl.constexpr, FC: gl.constexpr,
    DIAGONAL: gl.constexpr,
):  # fmt: skip
    """The last 8 rows of a chunk, transposed: y^T (64, 8) = V^T M^T costs an eighth of a tile of 64 rows."""
    bf: gl.constexpr = gl.bfloat16
    whole: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 8, 16])
    TT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])  # (8 rows of M, 64 columns)
    TD: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [4, 1], [1, 0])  # (8, 16)
    TF: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [4, 1], [1, 0])  # (8, FC)
    row: gl.constexpr = gl.SliceLayout(1, TD)
    R0: gl.constexpr = 64 * JT
    B0: gl.constexpr = R0 // 8
    tiles = V._reinterpret(bf, [JT + 1, 64, 64], whole)
    scores = S + (chunk.to(gl.int64) * ROWS + R0) * ROWS
    by8 = table._reinterpret(gl.float32, [128, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    by16 = table._reinterpret(gl.float32, [64, 16], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    by64 = table._reinterpret(gl.float32, [16, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    i = gl.arange(0, 8, layout=gl.SliceLayout(1, TT))
    j = gl.arange(0, 64, layout=gl.SliceLayout(0, TT))
    s = ()
    for J in gl.static_range(JT):
        s = s + (gl.load(scores + gl.expand_dims(i * ROWS, 1) + gl.expand_dims(j + 64 * J, 0)),)
    i = gl.arange(0, 8, layout=row)
    own = row0 + R0 + i
    ii = gl.expand_dims(i, 1)
    jj = gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(0, TD)), 0)
    s_last = gl.load(scores + ii * ROWS + (jj + R0)).to(gl.float32)
    if FC > 0:
        hh = gl.arange(0, FC, layout=gl.SliceLayout(0, TF))
        at = row0 + R0 + gl.arange(0, 8, layout=gl.SliceLayout(1, TF))
        to = gl.expand_dims((b * L + at).to(gl.int64) * H, 1) + gl.expand_dims(hh, 0)
        keep = gl.expand_dims(at < L, 1) & gl.expand_dims(hh < H, 0)
        fc_tail.store(gl.load(ddiag + to, mask=keep, other=0.0).to(bf))
    at = row0 + R0 + gl.arange(0, 8, layout=gl.SliceLayout(0, mma))
    p = gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    seen = gl.expand_dims(at < L, 0) & gl.expand_dims(p >= 0, 1)
    z_at = z + b.to(gl.int64) * stride_zb + gl.expand_dims(at * stride_zl, 0) + gl.expand_dims(p, 1)
    to = result + b.to(gl.int64) * stride_ob + gl.expand_dims(at * stride_ol, 0) + gl.expand_dims(p, 1)
    for k in range(turns):
        h = h0 + k * groups
        delta = gl.zeros([8], gl.float32, row)
        if DIAGONAL == 1:
            delta += gl.load(diag + h)
        if DIAGONAL == 2:
            delta = gl.load(diag + (b * H + h).to(gl.int64) * L + own, mask=own < L, other=0.0)
        if GATE:
            zv = gl.load(z_at + h * 64, mask=seen, other=0.0)
            w = gl.load(weight + h * 64 + p).to(gl.float32)
        mbarrier.wait(bars.index(2), k & 1)
        left = gl.expand_dims(by8.index(B0).load(gl.SliceLayout(1, TT)), 1)
        beside = ()
        for J in gl.static_range(JT):
            e = left - gl.expand_dims(by64.index(4 + J).load(gl.SliceLayout(0, TT)), 0)
            beside = beside + ((s[J].to(gl.float32) * _exp2(e)).to(bf),)
        left = gl.expand_dims(by8.index(B0).load(row), 1)
        left_col = gl.expand_dims(by16.index(16 + R0 // 16).load(gl.SliceLayout(0, TD)), 0)
        right = gl.expand_dims(by8.index(64 + B0).load(row), 1)
        right_col = gl.expand_dims(by16.index(48 + R0 // 16).load(gl.SliceLayout(0, TD)), 0)
        m = s_last * _exp2(gl.where(ii > jj, left - left_col, right - right_col))
        m = gl.where(ii == jj, gl.expand_dims(delta, 1), m).to(bf)
        for J in gl.static_range(JT):
            M_tail.index(J).store(beside[J])
        M_last.store(m)
        fence_async_shared()
        _barrier()
        mbarrier.wait(bars.index(0), k & 1)
        acc = gl.zeros((64, 8), gl.float32, mma)
        for J in gl.static_range(JT):
            acc = warpgroup_mma(tiles.index(J).permute((1, 0)), M_tail.index(J).permute((1, 0)), acc, is_async=True)
        v = tiles.index(JT).slice(0, 16, dim=0)
        acc = warpgroup_mma(v.permute((1, 0)), M_last.permute((1, 0)), acc, is_async=True)
        if FC > 0:
            mbarrier.wait(bars.index(4), k & 1)
            fc = output._reinterpret(bf, [64 // FC, FC, 64], fc_desc.layout).index(0)
            acc = warpgroup_mma(fc.permute((1, 0)), fc_tail.permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        _barrier()
        if k + 1 < turns:
            _fetch_table(table_desc, table, bars.index(2), chunk, h + groups, H)
            _fetch_v(v_desc, state_desc, V, states, bars.index(0), b, row0, c, nC, h + groups, H, BOXES, 0, False)
            if FC > 0:
                _fetch_second(fc_desc, fc_desc, output, bars.index(4), b, row0, h + groups, False, FC)
        if GATE:
            square = gl.sum(acc * acc, axis=0)
            acc = _gated(acc, zv, gl.expand_dims(w, 1))
            gl.store(squares + (b * H + h).to(gl.int64) * L + at, square, mask=at < L)
        gl.store(to + h * 64, acc.to(bf), mask=seen)


@gluon.jit
def _rows_program(
    v_desc, z_desc, out_desc, table_desc, state_desc, fc_desc, S, diag, weight, squares,
    left_rows, right_rows, ddiag, z, V, states, tables, scores, scores_tail, factors, outputs, weights, bars,
    b, c, chunk, row0, PI, h0, L, H, turns, groups, nC, stride_rb, stride_rl, stride_zb, stride_zl,
    ROWS: gl.constexpr, JT: gl.constexpr, TAIL: gl.constexpr, BOXES: gl.constexpr, BUFFERS: gl.constexpr,
    GATE: gl.constexpr, Z_MAP: gl.constexpr, HAS_STATE: gl.constexpr, LEFT: gl.constexpr, SHIFT: gl.constexpr,
    FC: gl.constexpr, DIAGONAL: gl.constexpr,
):  # fmt: skip
    """64 rows of a chunk."""
    bf: gl.constexpr = gl.bfloat16
    whole: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    SECOND: gl.constexpr = (GATE and Z_MAP) or FC > 0
    R0 = 64 * PI
    tiles = V._reinterpret(bf, [V.shape[0] * V.shape[2] // 64, 64, 64], whole)
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    P4: gl.constexpr = _blocks(4, 4)
    dl: gl.constexpr = gl.SliceLayout(2, P4)  # (block, row, column) of the blocks on the diagonal
    wr: gl.constexpr = gl.SliceLayout(2, dl)  # (block, row)
    wc: gl.constexpr = gl.SliceLayout(1, dl)  # (block, column)
    # factors: (column tile, row block, 8, 8), a warp a row block
    BL: gl.constexpr = gl.BlockedLayout([1, 1, 1, 8], [4, 1, 8, 1], [1, 4, 1, 1], [3, 2, 1, 0])
    cl4: gl.constexpr = gl.SliceLayout(1, BL)  # (column tile, 8, 8)
    first4: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, BL))  # (row block, 1)
    flat2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    flat3: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    # the 16 x 16 blocks of the scores on the diagonal
    r = gl.arange(0, 64, layout=gl.SliceLayout(1, operand))
    q = gl.arange(0, 16, layout=gl.SliceLayout(0, operand))
    to = S + (chunk.to(gl.int64) * ROWS + R0) * ROWS
    s_blocks = gl.load(to + gl.expand_dims(r * ROWS + R0 + r // 16 * 16, 1) + gl.expand_dims(q, 0))
    rows = row0 + R0 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    cols = gl.arange(0, 64, layout=gl.SliceLayout(0, mma))
    row16 = gl.expand_dims(gl.arange(0, 4, layout=gl.SliceLayout(1, wr)) * 16, 1) + gl.expand_dims(
        gl.arange(0, 16, layout=gl.SliceLayout(0, wr)), 0
    )
    row16 = row0 + R0 + row16  # (4, 16)
    if HAS_STATE:
        # C (or B) of the rows, read once: left operands of the products with the states
        n = gl.arange(0, 64, layout=gl.SliceLayout(0, operand))
        base = b.to(gl.int64) * stride_rb
        at = row0 + R0 + r - SHIFT
        to = gl.expand_dims(at * stride_rl, 1) + gl.expand_dims(n, 0)
        c_left = gl.load(left_rows + base + to, mask=gl.expand_dims((at >= 0) & (at < L), 1), other=0.0)
        at = row0 + R0 + r + SHIFT
        to = gl.expand_dims(at * stride_rl, 1) + gl.expand_dims(n, 0)
        c_right = gl.load(right_rows + base + to, mask=gl.expand_dims((at >= 0) & (at < L), 1), other=0.0)
    if FC > 0:
        at = row0 + R0 + r
        hh = gl.arange(0, FC, layout=gl.SliceLayout(0, operand))
        to = gl.expand_dims((b * L + at).to(gl.int64) * H, 1) + gl.expand_dims(hh, 0)
        keep = gl.expand_dims(at < L, 1) & gl.expand_dims(hh < H, 0)
        dd = gl.load(ddiag + to, mask=keep, other=0.0).to(bf)  # (64, FC)
    delta_next = gl.zeros([4, 16], gl.float32, wr)
    if DIAGONAL == 1:
        delta_next += gl.load(diag + h0)
    if DIAGONAL == 2:
        delta_next = gl.load(diag + (b * H + h0).to(gl.int64) * L + row16, mask=row16 < L, other=0.0)
    if GATE:
        wl: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
        turn = gl.arange(0, 8, layout=gl.SliceLayout(1, wl))
        at = gl.expand_dims((h0 + turn * groups) * 64, 1) + gl.expand_dims(
            gl.arange(0, 64, layout=gl.SliceLayout(0, wl)), 0
        )
        weights.store(gl.load(weight + at, mask=gl.expand_dims(turn < turns, 1) & (at >= 0), other=0.0).to(gl.float32))
    mbarrier.wait(bars.index(1), 0)
    for k in range(turns):
        h = h0 + k * groups
        delta = delta_next
        hn = gl.minimum(h + groups, H - 1)
        if DIAGONAL == 1:
            delta_next = gl.zeros([4, 16], gl.float32, wr) + gl.load(diag + hn)
        if DIAGONAL == 2:
            delta_next = gl.load(diag + (b * H + hn).to(gl.int64) * L + row16, mask=row16 < L, other=0.0)
        s = k % BUFFERS
        phase = (k // BUFFERS) & 1
        output = outputs.index(s)
        mbarrier.wait(bars.index(2 + s), phase)
        table = tables.index(s)
        # column factors towards each row block; zero inside the row block itself
        by64 = table._reinterpret(gl.float32, [4, 4, 8, 8], flat3)
        by16 = table._reinterpret(gl.float32, [16, 4, 16], flat2)
        col_l = gl.expand_dims(by64.index(1).load(cl4), 1)
        col_r = gl.expand_dims(by64.index(3).load(cl4), 1)
        fl0 = by16.index(PI).slice(0, 1, dim=1).load(first4)
        fr0 = by16.index(8 + PI).slice(15, 1, dim=1).load(first4)
        fl0 = gl.expand_dims(gl.expand_dims(fl0, 0), 2)  # (1, 4, 1, 1)
        fr0 = gl.expand_dims(gl.expand_dims(fr0, 0), 2)
        tile = gl.arange(0, 4, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, BL))))
        block = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, BL))))
        eight = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, BL))))
        jb = gl.expand_dims(gl.expand_dims(gl.expand_dims(tile * 4, 1), 2), 3) + gl.expand_dims(
            gl.expand_dims(gl.expand_dims(eight // 2, 0), 1), 3
        )  # (4, 1, 8, 1)
        ib = gl.expand_dims(gl.expand_dims(gl.expand_dims(block, 0), 2), 3) + 4 * PI  # (1, 4, 1, 1)
        before = jb < ib
        start = gl.where(jb == ib, -1e30, gl.where(before, fl0, fr0))
        factors.store(_exp2(start - gl.where(before, col_l, col_r)).to(bf))
        # blocks on the diagonal
        row_l = by16.index(PI).load(wr)
        row_r = by16.index(8 + PI).load(wr)
        ri3 = gl.expand_dims(gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(0, wr)), 0), 2)
        ci3 = gl.expand_dims(gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(0, wc)), 0), 1)
        e = gl.where(
            ri3 > ci3,
            gl.expand_dims(row_l, 2) - gl.expand_dims(by16.index(4 + PI).load(wc), 1),
            gl.expand_dims(row_r, 2) - gl.expand_dims(by16.index(12 + PI).load(wc), 1),
        )
        sd = gl.convert_layout(gl.reshape(s_blocks, (4, 16, 16)), dl, assert_trivial=True).to(gl.float32)
        d = gl.where(ri3 == ci3, gl.expand_dims(delta, 2), sd * _exp2(e)).to(bf)
        first_l = by16.index(PI).slice(0, 1, dim=1).load(wr)
        first_r = by16.index(8 + PI).slice(15, 1, dim=1).load(wr)
        fl = _pack(_exp2(row_l - first_l))
        fr = _pack(_exp2(row_r - first_r))
        if SECOND and BUFFERS == 1:
            if k > 0:
                tma.store_wait(0)
                _fetch_second(z_desc, fc_desc, output, bars.index(4), b, row0 + R0, h, GATE, FC)
        mbarrier.wait(bars.index(0), k & 1)
        acc = gl.zeros((64, 64), gl.float32, mma)
        by_tile = factors._reinterpret(bf, [4, 4, 4, 16], flat3)
        for o in gl.static_range(JT - 1):
            on_left = o < PI
            J = o + gl.where(on_left, 0, 1)
            m = _tile_beside(scores.index(J), by_tile.index(J), gl.where(on_left, fl, fr), 4, operand)
            acc = warpgroup_mma(m, tiles.index(J), acc, is_async=True)
            if o > 0:
                acc = warpgroup_mma_wait(1, deps=(acc,))
        m = _tile_on_diagonal(scores.index(PI), by_tile.index(PI), fl, fr, d, operand)
        acc = warpgroup_mma(m, tiles.index(PI), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        if TAIL > 0:
            m = _tile_beside(scores_tail, by_tile.index(JT).slice(0, 1, dim=1), fr, 1, operand)
            acc = warpgroup_mma(m, tiles.index(JT).slice(0, 16, dim=0), acc, is_async=True)
        if HAS_STATE:
            m = _mul2_packed(c_left, _spread(_pack(_exp2(row_l)), 4, operand))
            acc = warpgroup_mma(m, states.index(0), acc, is_async=True)
            m = _mul2_packed(c_right, _spread(_pack(_exp2(row_r)), 4, operand))
            acc = warpgroup_mma(m, states.index(1), acc, is_async=True)
        if SECOND:
            mbarrier.wait(bars.index(4 + s), phase)
        if FC > 0:
            fc = output._reinterpret(bf, [64 // FC, FC, 64], fc_desc.layout).index(0)
            acc = warpgroup_mma(dd, fc, acc, is_async=True)
        flat = output._reinterpret(bf, [64, 64], whole)
        if GATE:
            if not Z_MAP:
                z_at = gl.expand_dims(rows * stride_zl, 1) + gl.expand_dims(h * 64 + cols, 0)
                z_in = gl.expand_dims(rows < L, 1) & gl.expand_dims(cols >= 0, 0)
                zv = gl.load(z + b.to(gl.int64) * stride_zb + z_at, mask=z_in, other=0.0)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        if GATE:
            square = gl.sum(acc * acc, axis=1)
            if Z_MAP:
                zv = flat.load(mma)
            w = weights._reinterpret(gl.float32, [8, 64], gl.SwizzledSharedLayout(1, 1, 1, [0])).index(k)
            acc = _gated(acc, zv, gl.expand_dims(w.load(gl.SliceLayout(0, mma)), 0))
        if BUFFERS == 2 or not SECOND:
            tma.store_wait(0)
        _barrier()  # V, the table and what was in the place of the output are read
        if k + BUFFERS < turns:
            _fetch_table(table_desc, table, bars.index(2 + s), chunk, h + BUFFERS * groups, H)
        if k + 1 < turns:
            _fetch_v(
                v_desc, state_desc, V, states, bars.index(0), b, row0, c, nC, h + groups, H, BOXES, LEFT, HAS_STATE
            )  # fmt: skip
            if SECOND and BUFFERS == 2:
                _fetch_second(
                    z_desc, fc_desc, outputs.index(1 - s), bars.index(5 - s), b, row0 + R0, h + groups, GATE, FC
                )
        flat.store(acc.to(bf))
        fence_async_shared()
        _barrier()
        tma.async_copy_shared_to_global(out_desc, [b, row0 + R0, h * 64], output)
        if GATE:  # last: the fence above waits for every store before it
            gl.store(squares + (b * H + h).to(gl.int64) * L + rows, square, mask=rows < L)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=['L', 'H', 'turns'])
def mix_chunk_kernel(
    v_desc,  # (B, L, >= H * 64): boxes (1, 64 or 128 or 256, 64)
    z_desc,  # (B, L, >= H * 64), where GATE
    out_desc,  # (B, L, H * 64) out: boxes (1, 64, 64)
    score_desc,  # (B * nC * ROWS, ROWS): boxes (64, 64)
    score_tail_desc,  # the same, boxes (64, 16), where TAIL
    table_desc,  # (B * nC * H * 4, 256) float32
    state_desc,  # (B * H * 2 * nC * 64, 64), where HAS_STATE
    fc_desc,  # (H, H * 64), where FC: boxes (FC, 64)
    S,  # as score_desc (B * nC, ROWS, ROWS)
    diag,  # (B, H, L) or (H,) float32
    weight,  # (H * 64,), where GATE
    squares,  # (B, H, L) float32 out, where GATE: sum over a head of y^2
    left_rows,  # (B, L, 64), rows of stride_rl, where HAS_STATE: what multiplies the state on the left
    right_rows,
    ddiag,  # (B, L, H) float32, where FC
    z,  # as z_desc
    out,  # as out_desc
    L,
    H,
    turns,  # heads a program
    nC,
    stride_rb,
    stride_rl,
    stride_zb,
    stride_zl,
    stride_ob,
    stride_ol,
    ROWS: gl.constexpr,  # tokens a chunk
    JT: gl.constexpr,  # whole tiles of 64 rows and columns
    TAIL: gl.constexpr,  # columns beyond them: 0, or 16, of which 8 are rows too
    BOXES: gl.constexpr,  # of v_desc that a chunk has
    BUFFERS: gl.constexpr,  # heads whose exponents, z and outputs are in shared memory
    GATE: gl.constexpr,
    Z_MAP: gl.constexpr,  # z has rows of whole 16 bytes, as tensor maps need
    HAS_STATE: gl.constexpr,
    LEFT: gl.constexpr,  # the direction (0 forward, 1 backward) whose state is on the left
    SHIFT: gl.constexpr,  # rows between a token and the one whose C it reads: 1, or 0 for B
    FC: gl.constexpr,  # heads, padded, where the diagonal's gradient goes through fc_D; 0
    DIAGONAL: gl.constexpr,  # 0 none, 1 (H,), 2 (B, H, L)
):
    """One program: 64 rows of a chunk, or its tail, and a group of heads in turn."""
    bf: gl.constexpr = gl.bfloat16
    whole: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    PARTS: gl.constexpr = JT + (1 if TAIL > 0 else 0)
    groups = H // turns
    pid = gl.program_id(0)
    PI = pid % PARTS
    h0 = (pid // PARTS) % groups
    chunk = pid // (PARTS * groups)
    b = chunk // nC
    c = chunk % nC
    row0 = c * ROWS
    if row0 + 64 * PI >= L:
        return
    V = gl.allocate_shared_memory(bf, [BOXES, 1, v_desc.block_shape[1], 64], v_desc.layout)
    outputs = gl.allocate_shared_memory(bf, [BUFFERS, 1, 64, 64], out_desc.layout)
    tables = gl.allocate_shared_memory(gl.float32, [BUFFERS, 4, 256], table_desc.layout)
    states = gl.allocate_shared_memory(bf, [2 if HAS_STATE else 1, 64 if HAS_STATE else 8, 64], whole)
    factors = gl.allocate_shared_memory(bf, [4, 4, 8, 8], gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0]))
    scores = gl.allocate_shared_memory(bf, [JT, 64, 64], score_desc.layout)
    scores_tail = gl.allocate_shared_memory(bf, [64 if TAIL > 0 else 8, 16], score_tail_desc.layout)
    weights = gl.allocate_shared_memory(gl.float32, [8 if GATE else 1, 64], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    # V full 0, scores 1, exponents full 2 3, z or fc_D full 4 5
    bars = gl.allocate_shared_memory(gl.int64, [6, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(6):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    _barrier()
    _fetch_table(table_desc, tables.index(0), bars.index(2), chunk, h0, H)
    _fetch_v(v_desc, state_desc, V, states, bars.index(0), b, row0, c, nC, h0, H, BOXES, LEFT, HAS_STATE)
    if TAIL > 0:
        if PI == JT:
            if FC > 0:
                _fetch_second(fc_desc, fc_desc, outputs.index(0), bars.index(4), b, row0, h0, False, FC)
            # in the place of scores and factors, which the other programs need
            M_tail = scores._reinterpret(bf, [8 * JT, 8, 64], whole)
            M_last = scores_tail._reinterpret(bf, [8, 8, 16], gl.NVMMASharedLayout(32, 16, 2)).index(0)
            fc_swizzle: gl.constexpr = 32 if FC == 16 else (64 if FC == 32 else 128)
            fc_tail = factors._reinterpret(
                bf, [128 // (FC if FC > 0 else 64), 8, FC if FC > 0 else 64], gl.NVMMASharedLayout(fc_swizzle, 16, 2)
            ).index(0)
            _tail_program(
                v_desc, table_desc, state_desc, fc_desc, S, diag, weight, squares, ddiag, z, out,
                V, states, tables.index(0), M_tail, M_last, fc_tail, outputs.index(0), bars, b, c, chunk, row0, h0, L,
                H, turns, groups, nC, stride_zb, stride_zl, stride_ob, stride_ol,
                ROWS, JT, BOXES, GATE, FC, DIAGONAL,
            )  # fmt: skip
            return
    if (GATE and Z_MAP) or FC > 0:
        _fetch_second(z_desc, fc_desc, outputs.index(0), bars.index(4), b, row0 + 64 * PI, h0, GATE, FC)
    if BUFFERS == 2:
        if turns > 1:
            _fetch_table(table_desc, tables.index(1), bars.index(3), chunk, h0 + groups, H)
    full = bars.index(1)
    mbarrier.expect(full, JT * 8192 + TAIL * 128)
    for i in gl.static_range(JT):
        tma.async_copy_global_to_shared(score_desc, [chunk * ROWS + 64 * PI, i * 64], full, scores.index(i))
    if TAIL > 0:
        tma.async_copy_global_to_shared(score_tail_desc, [chunk * ROWS + 64 * PI, JT * 64], full, scores_tail)
    _rows_program(
        v_desc, z_desc, out_desc, table_desc, state_desc, fc_desc, S, diag, weight, squares,
        left_rows, right_rows, ddiag, z, V, states, tables, scores, scores_tail, factors, outputs, weights, bars,
        b, c, chunk, row0, PI, h0, L, H, turns, groups, nC, stride_rb, stride_rl, stride_zb, stride_zl,
        ROWS, JT, TAIL, BOXES, BUFFERS, GATE, Z_MAP, HAS_STATE, LEFT, SHIFT, FC, DIAGONAL,
    )  # fmt: skip


def mix_chunks(
    c: Any, v: Tensor, out: Tensor, S: Tensor, table: Tensor, diag: Optional[Tensor],
    states: Optional[Tensor], rows: tuple[Tensor, Tensor], transposed: bool = False,
    gate: Optional[tuple[Tensor, Tensor, Tensor]] = None, diagonal: Optional[tuple[Tensor, Tensor]] = None,
) -> None:  # fmt: skip
    """Writes M v into ``out``; sizes ``c`` and the other arguments as in chunks.py."""
    width = c.H * 64
    box = 64 if c.nC > 1 else {1: 64, 2: 128}.get(c.NT, 256)
    v_desc = _rows_of(v, width, box)
    z, weight, squares = (v, table, table) if gate is None else gate
    fc, ddiag = (S, table) if diagonal is None else diagonal
    steps = (z.stride(0), z.stride(1))
    z_map = gate is not None and not z.data_ptr() % 16 and all(step > 0 and step % 8 == 0 for step in steps)
    FC = 0 if diagonal is None else max(16, 1 << (c.H - 1).bit_length())
    unused = _flat(S, 64, 64, WHOLE)
    launch(mix_chunk_kernel, (c.B * c.nC * c.NT * (c.H // c.turns),),
        v_desc, _rows_of(z, width) if z_map else v_desc, _rows_of(out, width), unused, _flat(S, 64, 16, SIXTEEN),
        _flat(table, 4, 256, PLAIN), unused if states is None else _flat(states, 64, 64, WHOLE),
        unused if diagonal is None else _flat(fc, FC, 64, WHOLE),
        S, table if diag is None else diag, weight, squares, *rows, ddiag, z, out,
        c.L, c.H, c.turns, c.nC, rows[0].stride(0), rows[0].stride(1), z.stride(0), z.stride(1), out.stride(0),
        out.stride(1), ROWS=c.rows, JT=c.full, TAIL=c.tail,
        BOXES=-(-64 * c.full // box), BUFFERS=2 if c.nC > 1 else 1, GATE=gate is not None,
        Z_MAP=z_map, HAS_STATE=states is not None, LEFT=int(transposed), SHIFT=0 if transposed else 1, FC=FC,
        DIAGONAL=0 if diag is None else min(diag.ndim, 2), num_warps=4, maxnreg=168 if states is None else 240,
    )  # fmt: skip
