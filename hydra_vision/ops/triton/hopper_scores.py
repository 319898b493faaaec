"""The gradient of the scores over whole chunks of a sequence, on Hopper (Gluon)."""

# ruff: noqa: SIM102  (what is known at compile time is a condition of its own)

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    mma_v2,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper import PLAIN, SIXTEEN, WHOLE, _barrier, _exp2, _flat, _mul2_packed, _pack, _rows_of
from .launch import launch

__all__ = ['score_grads', 'score_grads_kernel']

HALF = gl.NVMMASharedLayout(64, 16, 2)
REGISTERS = {1: 255, 2: 240, 3: 168, 4: 128}  # a thread, by warpgroups


@gluon.jit
def _and2(a, m):
    """bfloat16 a where m, int16, is -1; zero where it is 0."""
    return gl.inline_asm_elementwise('and.b32 $0, $1, $2;', '=r,r,r', [a, m], dtype=gl.bfloat16, is_pure=True, pack=2)


@gluon.jit
def _fetch_pairs(
    x_desc, y_desc, x_tail_desc, y_tail_desc, table_desc, X, Y, X_tail, Y_tail, tables, bar, s, b, row0, chunk, h, H, I,
    FULL: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """X of the chunk, dY of row tile I and of the tail, and the exponents of head h."""
    mbarrier.expect(bar, (FULL + 1) * 8192 + 4096 + (4096 if TAIL > 0 else 0))
    tma.async_copy_global_to_shared(y_desc, [b, row0 + 64 * I, h * 64], bar, Y.index(s))
    for j in gl.static_range(FULL):
        tma.async_copy_global_to_shared(x_desc, [b, row0 + 64 * j, h * 64], bar, X.index(s * FULL + j))
    if TAIL > 0:
        tma.async_copy_global_to_shared(x_tail_desc, [b, row0 + 64 * FULL, h * 64], bar, X_tail.index(s))
        tma.async_copy_global_to_shared(y_tail_desc, [b, row0 + 64 * FULL, h * 64], bar, Y_tail.index(s))
    tma.async_copy_global_to_shared(table_desc, [(chunk * H + h) * 4, 0], bar, tables.index(s))


@gluon.jit
def _stage_of(
    x_desc, y_desc, x_tail_desc, y_tail_desc, table_desc, X, Y, X_tail, Y_tail, tables, bars, b, row0, chunk, h, H, I,
    W: gl.constexpr, FULL: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Waits for head h and returns its stage. Warpgroup 0 also sends for a later head."""
    s = h % STAGES
    if W == 0:
        # the stage that comes two heads later was last read by the head before this one
        if (h > 0) & (h + STAGES - 1 < H):
            t = (h + STAGES - 1) % STAGES
            mbarrier.wait(bars.index(STAGES + t), ((h - 1) // STAGES) & 1)
            _fetch_pairs(
                x_desc, y_desc, x_tail_desc, y_tail_desc, table_desc, X, Y, X_tail, Y_tail, tables, bars.index(t), t,
                b, row0, chunk, h + STAGES - 1, H, I, FULL, TAIL,
            )  # fmt: skip
    mbarrier.wait(bars.index(s), (h // STAGES) & 1)
    return s


@gluon.jit
def _row_sums(g, out, K: gl.constexpr):
    """Sums over the columns of g (64, K) -> out[:64]."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[4, 1], instr_shape=[16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    one = gl.full((K, 8), 1.0, gl.bfloat16, right)
    acc = mma_v2(gl.convert_layout(g, left), one, gl.zeros((64, 8), gl.float32, mma))
    i = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, mma)), 1)
    n = gl.expand_dims(gl.arange(0, 8, layout=gl.SliceLayout(0, mma)), 0)
    gl.store(out + i + n * 0, acc, mask=(n == 0) & (i >= 0))


@gluon.jit
def _column_sums(tile, out, K: gl.constexpr):
    """Sums over the rows of a tile (64, K) in shared memory, by the warps in turn -> out[: K]."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 4], instr_shape=[16, 8])
    one = gl.full((16, 64), 1.0, gl.bfloat16, gl.DotOperandLayout(0, mma, 2))
    acc = mma_v2(one, tile.load(gl.DotOperandLayout(1, mma, 2)), gl.zeros((16, K), gl.float32, mma))
    i = gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(1, mma)), 1)
    j = gl.expand_dims(gl.arange(0, K, layout=gl.SliceLayout(0, mma)), 0)
    gl.store(out + i * 0 + j, acc, mask=(i == 0) & (j >= 0))


@gluon.jit
def _columns_loop(
    x_desc, y_desc, x_tail_desc, y_tail_desc, table_desc, table, row_sums, col_sums, dS, dST, S, X, Y, X_tail, Y_tail,
    tables, G, bars, b, chunk, row0, H, I,
    J: gl.constexpr, FULL: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Row tile I of the chunk against another column tile J, for every head."""
    bf: gl.constexpr = gl.bfloat16
    NT: gl.constexpr = FULL + (1 if TAIL > 0 else 0)
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    column: gl.constexpr = gl.SliceLayout(0, mma)
    flat1: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    i = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, mma)), 1)
    j = gl.expand_dims(gl.arange(0, 64, layout=column), 0)
    # exponents 0 and 1 where the columns come first, 2 and 3 where they follow, both from the edge between the tiles
    plane = gl.where(I > J, 0, 2)
    edge = plane * 256 + 64 * I + gl.where(I > J, 0, 63)
    acc = gl.zeros((64, 64), gl.float32, mma)
    ref_next = gl.load(table + (chunk * H).to(gl.int64) * 1024 + edge)
    mbarrier.wait(bars.index(2 * STAGES), 0)
    for h in range(H):
        ref = ref_next
        ref_next = gl.load(table + (chunk * H + gl.minimum(h + 1, H - 1)).to(gl.int64) * 1024 + edge)
        s = _stage_of(
            x_desc, y_desc, x_tail_desc, y_tail_desc, table_desc, X, Y, X_tail, Y_tail, tables, bars, b, row0, chunk, h,
            H, I, J, FULL, TAIL, STAGES,
        )  # fmt: skip
        lines = tables.index(s)._reinterpret(gl.float32, [16, 64], flat1)
        f = _pack(_exp2(lines.index(4 * plane + I).load(gl.SliceLayout(1, operand)) - ref))
        dy = Y.index(s)._reinterpret(bf, [64, 64], S.layout).load(operand)
        dy = _mul2_packed(dy, gl.expand_dims(f, 1).broadcast_to([64, 64]))
        x = X.index(s * FULL + J)._reinterpret(bf, [64, 64], S.layout)
        p = warpgroup_mma(dy, x.permute((1, 0)), gl.zeros((64, 64), gl.float32, mma), use_acc=False, is_async=True)
        factor = gl.expand_dims(_exp2(ref - lines.index(4 * (plane + 1) + J).load(column)), 0)
        p = warpgroup_mma_wait(0, deps=(p,))
        grad = p * factor
        acc += grad
        g = (grad * gl.convert_layout(S.index(J).load(operand), mma, assert_trivial=True).to(gl.float32)).to(bf)
        head = (chunk * H + h).to(gl.int64)
        below = G.index(2 * J + h % 2)
        below.store(g)
        _row_sums(g, row_sums + head * ((NT + 3) * 256) + J * 256 + I * 64, 64)
        _barrier()
        if J > 0:
            mbarrier.arrive(bars.index(STAGES + s), count=1)
        _column_sums(below, col_sums + head * ((NT + 1) * 256) + I * 256 + J * 64, 64)
    v = acc.to(bf)
    block = chunk.to(gl.int64) * NT
    gl.store(dS + ((block + I) * NT + J) * 4096 + i * 64 + j, v)
    gl.store(dST + ((block + J) * NT + I) * 4096 + j * 64 + i, v)


@gluon.jit
def _diagonal_loop(
    x_desc, y_desc, x_tail_desc, y_tail_desc, table_desc, table, row_sums, col_sums, dS, dST, S, S_tail, X, Y,
    X_tail, Y_tail, tables, G, G_tail, bars, b, chunk, row0, H, I,
    W: gl.constexpr, HALF: gl.constexpr, FULL: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Row tile I against a half of its own columns, for every head, and against the tail: half 0 takes its columns,
    half 1 its rows, transposed. The tail's own pairs are in chunks.py."""
    bf: gl.constexpr = gl.bfloat16
    NT: gl.constexpr = FULL + (1 if TAIL > 0 else 0)
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 32, 16])
    mma_t: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 16, 16])
    whole: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    operand_t: gl.constexpr = gl.DotOperandLayout(0, mma_t, 2)
    row: gl.constexpr = gl.SliceLayout(1, mma)
    column: gl.constexpr = gl.SliceLayout(0, mma)
    column_t: gl.constexpr = gl.SliceLayout(0, mma_t)
    flat1: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    i = gl.expand_dims(gl.arange(0, 64, layout=row), 1)
    j = gl.expand_dims(gl.arange(0, 32, layout=column), 0) + 32 * HALF
    under = gl.where(i > j, -1, 0).to(gl.int16)
    over = gl.where(i < j, -1, 0).to(gl.int16)
    acc = gl.zeros((64, 32), gl.float32, mma)
    acc_t = gl.zeros((64, 16), gl.float32, mma_t)
    if HALF == 0:
        edge = 512 + 64 * I + 63
    else:
        edge = I * 0 + 64 * FULL
    if TAIL > 0:
        ref_next = gl.load(table + (chunk * H).to(gl.int64) * 1024 + edge)
    mbarrier.wait(bars.index(2 * STAGES), 0)
    halves = S.index(I)._reinterpret(bf, [2, 64, 32], gl.NVMMASharedLayout(64, 16, 2))
    for h in range(H):
        if TAIL > 0:
            ref = ref_next
            ref_next = gl.load(table + (chunk * H + gl.minimum(h + 1, H - 1)).to(gl.int64) * 1024 + edge)
        s = _stage_of(
            x_desc, y_desc, x_tail_desc, y_tail_desc, table_desc, X, Y, X_tail, Y_tail, tables, bars, b, row0, chunk, h,
            H, I, W, FULL, TAIL, STAGES,
        )  # fmt: skip
        rows = tables.index(s)._reinterpret(gl.float32, [16, 64], flat1)
        lines = tables.index(s)._reinterpret(gl.float32, [32, 32], flat1)
        ends = tables.index(s)._reinterpret(gl.float32, [64, 16], flat1)
        head = (chunk * H + h).to(gl.int64)
        r_out = row_sums + head * ((NT + 3) * 256)
        c_out = col_sums + head * ((NT + 1) * 256)
        y_tile = Y.index(s)._reinterpret(bf, [64, 64], whole)
        x_tile = X.index(s * FULL + I)._reinterpret(bf, [64, 64], whole)
        dy = y_tile.load(operand)
        p = warpgroup_mma(
            dy, x_tile.slice(32 * HALF, 32, dim=0).permute((1, 0)), gl.zeros((64, 32), gl.float32, mma),
            use_acc=False, is_async=True,
        )  # fmt: skip
        near = 2 * I + HALF
        e_l = gl.expand_dims(rows.index(I).load(row), 1) - gl.expand_dims(lines.index(8 + near).load(column), 0)
        e_r = gl.expand_dims(rows.index(8 + I).load(row), 1) - gl.expand_dims(lines.index(24 + near).load(column), 0)
        # the diagonal alone is not <= 0, it may overflow: it is dropped below and at the end
        factor = _exp2(gl.where(i > j, e_l, e_r))
        p = warpgroup_mma_wait(0, deps=(p,))
        if TAIL > 0:  # on its way while the half is added up
            if HALF == 0:
                f = _pack(_exp2(rows.index(8 + I).load(gl.SliceLayout(1, operand_t)) - ref))
                a = _mul2_packed(
                    gl.convert_layout(dy, operand_t, assert_trivial=True), gl.expand_dims(f, 1).broadcast_to([64, 64])
                )
                other = X_tail.index(s)._reinterpret(bf, [16, 64], whole)
            else:
                f = _pack(_exp2(ref - rows.index(4 + I).load(gl.SliceLayout(1, operand_t))))
                a = _mul2_packed(x_tile.load(operand_t), gl.expand_dims(f, 1).broadcast_to([64, 64]))
                other = Y_tail.index(s)._reinterpret(bf, [16, 64], whole)
            q = warpgroup_mma(
                a, other.permute((1, 0)), gl.zeros((64, 16), gl.float32, mma_t), use_acc=False, is_async=True
            )
        grad = p * factor
        acc += grad
        s_tile = gl.convert_layout(halves.index(HALF).load(operand), mma, assert_trivial=True)
        g = (grad * s_tile.to(gl.float32)).to(bf)
        lower = _and2(g, under)
        upper = _and2(g, over)
        below = G.index(2 * W + h % 2)._reinterpret(bf, [2, 64, 32], gl.NVMMASharedLayout(64, 16, 2)).index(0)
        above = G.index(2 * W + h % 2)._reinterpret(bf, [2, 64, 32], gl.NVMMASharedLayout(64, 16, 2)).index(1)
        below.store(lower)
        above.store(upper)
        if HALF == 0:
            _row_sums(lower, r_out + I * 256 + I * 64, 32)
            _row_sums(upper, r_out + NT * 256 + I * 64, 32)
        else:
            _row_sums(lower, r_out + (NT + 1) * 256 + I * 64, 32)
            _row_sums(upper, r_out + (NT + 2) * 256 + I * 64, 32)
        if TAIL > 0:
            q = warpgroup_mma_wait(0, deps=(q,))
            if HALF == 0:
                scale = _exp2(ref - ends.index(48 + 4 * FULL).load(column_t))
            else:
                scale = _exp2(ends.index(4 * FULL).load(column_t) - ref)
            grad = q * gl.expand_dims(scale, 0)
            acc_t += grad
            s_beside = gl.convert_layout(S_tail.index(HALF).load(operand_t), mma_t, assert_trivial=True)
            g = (grad * s_beside.to(gl.float32)).to(bf)
            beside = G_tail.index(2 * HALF + h % 2)
            beside.store(g)
            if HALF == 0:
                _row_sums(g, r_out + FULL * 256 + I * 64, 16)
            else:
                _row_sums(g, c_out + FULL * 256 + I * 64, 16)
        _barrier()
        if W > 0:
            mbarrier.arrive(bars.index(STAGES + s), count=1)
        _column_sums(below, c_out + I * 256 + I * 64 + 32 * HALF, 32)
        _column_sums(above, c_out + NT * 256 + I * 64 + 32 * HALF, 32)
        if TAIL > 0:
            if HALF == 0:
                _column_sums(beside, c_out + I * 256 + 64 * FULL, 16)
            else:
                _column_sums(beside, r_out + I * 256 + 64 * FULL, 16)
    v = gl.where(i == j, 0.0, acc).to(bf)
    block = chunk.to(gl.int64) * NT
    gl.store(dS + ((block + I) * NT + I) * 4096 + i * 64 + j, v)
    gl.store(dST + ((block + I) * NT + I) * 4096 + j * 64 + i, v)
    if TAIL > 0:
        v = acc_t.to(bf)
        i = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, mma_t)), 1)
        j = gl.expand_dims(gl.arange(0, 16, layout=column_t), 0)
        if HALF == 0:
            gl.store(dS + ((block + I) * NT + FULL) * 4096 + i * 64 + j, v)
            gl.store(dST + ((block + FULL) * NT + I) * 4096 + j * 64 + i, v)
        else:  # transposed: i is the column
            gl.store(dS + ((block + FULL) * NT + I) * 4096 + j * 64 + i, v)
            gl.store(dST + ((block + I) * NT + FULL) * 4096 + i * 64 + j, v)


@gluon.jit
def _score_grads_group(
    x_desc, y_desc, x_tail_desc, y_tail_desc, table_desc, table, row_sums, col_sums, dS, dST, S, S_tail, X, Y,
    X_tail, Y_tail, tables, G, G_tail, bars, b, chunk, row0, H, I,
    W: gl.constexpr, FULL: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Column tile W of row tile I, where it is I's own half of it; the last warpgroup has the other half."""
    if W == FULL:
        _diagonal_loop(
            x_desc, y_desc, x_tail_desc, y_tail_desc, table_desc, table, row_sums, col_sums, dS, dST, S, S_tail,
            X, Y, X_tail, Y_tail, tables, G, G_tail, bars, b, chunk, row0, H, I, W, 1, FULL, TAIL, STAGES,
        )  # fmt: skip
    elif I == W:
        _diagonal_loop(
            x_desc, y_desc, x_tail_desc, y_tail_desc, table_desc, table, row_sums, col_sums, dS, dST, S, S_tail,
            X, Y, X_tail, Y_tail, tables, G, G_tail, bars, b, chunk, row0, H, I, W, 0, FULL, TAIL, STAGES,
        )  # fmt: skip
    elif FULL > 1:
        _columns_loop(
            x_desc, y_desc, x_tail_desc, y_tail_desc, table_desc, table, row_sums, col_sums, dS, dST, S, X, Y, X_tail,
            Y_tail, tables, G, bars, b, chunk, row0, H, I, W, FULL, TAIL, STAGES,
        )  # fmt: skip


@gluon.jit(do_not_specialize=['H'])
def score_grads_kernel(
    x_desc,  # (B, L, >= H * 64): boxes (1, 64, 64)
    y_desc,  # (B, L, >= H * 64)
    x_tail_desc,  # the same in boxes (1, 16, 64)
    y_tail_desc,
    score_desc,  # (B * nC * rows, rows): boxes (64, 64)
    half_desc,  # the same, boxes (64, 32)
    tail_desc,  # the same, boxes (64, 16)
    transposed_desc,  # S^T, boxes (64, 16)
    table_desc,  # (B * nC * H * 4, 256) float32
    table,  # as table_desc
    row_sums,  # (B * nC, H, NT + 3, 256) float32 out: sums of G = dM o M over columns, [J] of column tile J; of the
    # tile on the diagonal [I] below it, [NT] above it, and [NT + 1], [NT + 2] of its other half of columns
    col_sums,  # (B * nC, H, NT + 1, 256) float32 out: the same over rows: [I] of row tile I, [NT] above the diagonal
    dS,  # (B * nC, NT, NT, 64, 64) out: [I][J]
    dST,  # (B * nC, NT, NT, 64, 64) out: [J][I], each tile transposed
    H,
    nC,
    FULL: gl.constexpr,  # whole tiles of a chunk
    TAIL: gl.constexpr,  # rows and columns of the tile after them, 16, or 0: none
    STAGES: gl.constexpr,
):
    """dS[i, j] = sum over heads of (dY_i . X_j) * decay * dt_j.

    A program is a row tile, a warpgroup one of its column tiles. The tile on the diagonal has exponents of its own for
    each pair and four sums instead of two: it is shared by two warpgroups. A tail of a few rows is shared by all
    programs. Sums of G over columns and over rows add the same bfloat16 values: differences do not feel the rounding.
    """
    bf: gl.constexpr = gl.bfloat16
    NT: gl.constexpr = FULL + (1 if TAIL > 0 else 0)
    SOME: gl.constexpr = 1 if TAIL > 0 else 0
    S = gl.allocate_shared_memory(bf, [FULL, 64, 64], score_desc.layout)
    S_tail = gl.allocate_shared_memory(bf, [2 * SOME + 1 - SOME, 64 if TAIL > 0 else 8, 16], tail_desc.layout)
    X = gl.allocate_shared_memory(bf, [STAGES * FULL, 1, 64, 64], x_desc.layout)
    Y = gl.allocate_shared_memory(bf, [STAGES, 1, 64, 64], y_desc.layout)
    X_tail = gl.allocate_shared_memory(bf, [STAGES if TAIL > 0 else 1, 1, 16 if TAIL > 0 else 8, 64], x_desc.layout)
    Y_tail = gl.allocate_shared_memory(bf, [STAGES if TAIL > 0 else 1, 1, 16 if TAIL > 0 else 8, 64], x_desc.layout)
    tables = gl.allocate_shared_memory(gl.float32, [STAGES, 4, 256], table_desc.layout)
    G = gl.allocate_shared_memory(bf, [2 * (FULL + 1), 64, 64], score_desc.layout)
    G_tail = gl.allocate_shared_memory(bf, [4 if TAIL > 0 else 1, 64 if TAIL > 0 else 8, 16], tail_desc.layout)
    # full, read of each stage; scores
    bars = gl.allocate_shared_memory(gl.int64, [2 * STAGES + 1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * STAGES + 1):
        if i >= STAGES and i < 2 * STAGES:
            mbarrier.init(bars.index(i), count=FULL)
        else:
            mbarrier.init(bars.index(i), count=1)
    pid = gl.program_id(0)
    I = pid % FULL
    chunk = pid // FULL
    b = chunk // nC
    row0 = (chunk % nC) * (64 * NT)
    for k in gl.static_range(STAGES):
        if k < H:
            _fetch_pairs(
                x_desc, y_desc, x_tail_desc, y_tail_desc, table_desc, X, Y, X_tail, Y_tail, tables, bars.index(k), k,
                b, row0, chunk, k, H, I, FULL, TAIL,
            )  # fmt: skip
    full = bars.index(2 * STAGES)
    mbarrier.expect(full, FULL * 8192 + (4096 if TAIL > 0 else 0))
    to = chunk * (64 * NT) + I * 64
    for J in gl.static_range(FULL):
        if J == I:
            halves = S.index(J)._reinterpret(bf, [2, 64, 32], half_desc.layout)
            tma.async_copy_global_to_shared(half_desc, [to, J * 64], full, halves.index(0))
            tma.async_copy_global_to_shared(half_desc, [to, J * 64 + 32], full, halves.index(1))
        else:
            tma.async_copy_global_to_shared(score_desc, [to, J * 64], full, S.index(J))
    if TAIL > 0:
        tma.async_copy_global_to_shared(tail_desc, [to, FULL * 64], full, S_tail.index(0))
        tma.async_copy_global_to_shared(transposed_desc, [to, FULL * 64], full, S_tail.index(1))
    if FULL == 1:
        gl.warp_specialize([
            (_score_grads_group, (
                x_desc, y_desc, x_tail_desc, y_tail_desc, table_desc, table, row_sums, col_sums, dS, dST, S,
                S_tail, X, Y, X_tail, Y_tail, tables, G, G_tail, bars, b, chunk, row0, H, I, 0, FULL, TAIL, STAGES,
            )),
            (_score_grads_group, (
                x_desc, y_desc, x_tail_desc, y_tail_desc, table_desc, table, row_sums, col_sums, dS, dST, S,
                S_tail, X, Y, X_tail, Y_tail, tables, G, G_tail, bars, b, chunk, row0, H, I, 1, FULL, TAIL, STAGES,
            )),
        ], [4], [240])  # fmt: skip
    elif FULL == 2:
        gl.warp_specialize([
            (_score_grads_group, (
                x_desc, y_desc, x_tail_desc, y_tail_desc, table_desc, table, row_sums, col_sums, dS, dST, S,
                S_tail, X, Y, X_tail, Y_tail, tables, G, G_tail, bars, b, chunk, row0, H, I, 0, FULL, TAIL, STAGES,
            )),
            (_score_grads_group, (
                x_desc, y_desc, x_tail_desc, y_tail_desc, table_desc, table, row_sums, col_sums, dS, dST, S,
                S_tail, X, Y, X_tail, Y_tail, tables, G, G_tail, bars, b, chunk, row0, H, I, 1, FULL, TAIL, STAGES,
            )),
            (_score_grads_group, (
                x_desc, y_desc, x_tail_desc, y_tail_desc, table_desc, table, row_sums, col_sums, dS, dST, S,
                S_tail, X, Y, X_tail, Y_tail, tables, G, G_tail, bars, b, chunk, row0, H, I, 2, FULL, TAIL, STAGES,
            )),
        ], [4, 4], [168, 168])  # fmt: skip
    elif FULL == 3:
        gl.warp_specialize([
            (_score_grads_group, (
                x_desc, y_desc, x_tail_desc, y_tail_desc, table_desc, table, row_sums, col_sums, dS, dST, S,
                S_tail, X, Y, X_tail, Y_tail, tables, G, G_tail, bars, b, chunk, row0, H, I, 0, FULL, TAIL, STAGES,
            )),
            (_score_grads_group, (
                x_desc, y_desc, x_tail_desc, y_tail_desc, table_desc, table, row_sums, col_sums, dS, dST, S,
                S_tail, X, Y, X_tail, Y_tail, tables, G, G_tail, bars, b, chunk, row0, H, I, 1, FULL, TAIL, STAGES,
            )),
            (_score_grads_group, (
                x_desc, y_desc, x_tail_desc, y_tail_desc, table_desc, table, row_sums, col_sums, dS, dST, S,
                S_tail, X, Y, X_tail, Y_tail, tables, G, G_tail, bars, b, chunk, row0, H, I, 2, FULL, TAIL, STAGES,
            )),
            (_score_grads_group, (
                x_desc, y_desc, x_tail_desc, y_tail_desc, table_desc, table, row_sums, col_sums, dS, dST, S,
                S_tail, X, Y, X_tail, Y_tail, tables, G, G_tail, bars, b, chunk, row0, H, I, 3, FULL, TAIL, STAGES,
            )),
        ], [4, 4, 4], [128, 128, 128])  # fmt: skip


def score_grads(
    c: Any, x: Tensor, dy: Tensor, S: Tensor, ST: Tensor, table: Tensor, row_sums: Tensor, col_sums: Tensor,
    dS: Tensor, dST: Tensor,
) -> None:  # fmt: skip
    """The scores' gradient and the sums of G; arguments as in chunks.py."""
    width = c.H * 64
    launch(score_grads_kernel, (c.B * c.nC * c.full,),
        _rows_of(x, width), _rows_of(dy, width), _rows_of(x, width, 16), _rows_of(dy, width, 16),
        _flat(S, 64, 64, WHOLE), _flat(S, 64, 32, HALF), _flat(S, 64, 16, SIXTEEN), _flat(ST, 64, 16, SIXTEEN),
        _flat(table, 4, 256, PLAIN), table, row_sums, col_sums, dS, dST, c.H, c.nC,
        FULL=c.full, TAIL=c.tail, STAGES=3, num_warps=4, maxnreg=REGISTERS[c.full + 1],
    )  # fmt: skip
