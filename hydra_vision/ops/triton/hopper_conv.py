"""Convolution, SiLU and the diagonal fc_D(x) + D in one pass, on Hopper (Gluon)."""

# ruff: noqa: RUF005, SIM102  (Gluon unpacks no tuples; what is known at compile time is a condition of its own)

from typing import Optional

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from .hopper import _barrier, _tanh
from .launch import launch

__all__ = ['conv_diagonal_kernel', 'convolve']


@gluon.jit
def _conv_tile(
    x, taps, fc_at, some, out, a_buffer, f_buffer, acc, t0, L, SL: gl.constexpr, C: gl.constexpr, D: gl.constexpr,
    CH: gl.constexpr, layout: gl.constexpr, MASK: gl.constexpr, DIAGONAL: gl.constexpr,
):  # fmt: skip
    """64 tokens, all channels in steps of CH: a thread owns CH / 32 channels of 8 consecutive tokens."""
    rl: gl.constexpr = gl.SliceLayout(1, layout)
    cl: gl.constexpr = gl.SliceLayout(0, layout)
    g = gl.arange(0, 8, layout=rl) * 8 + t0
    ch = gl.arange(0, CH, layout=cl)
    every = gl.expand_dims(ch >= 0, 0)
    px = x + gl.expand_dims(g * SL, 1) + gl.expand_dims(ch, 0)
    po = out + gl.expand_dims(g * C, 1) + gl.expand_dims(ch, 0)
    for c in range(0, C, CH):
        window = ()
        for r in gl.static_range(14):
            if MASK:
                keep = gl.expand_dims((g + (r - 3) >= 0) & (g + (r - 3) < L), 1) & every
                window = window + (gl.load(px + (r - 3) * SL, mask=keep, other=0.0),)
            elif r < 3:
                keep = gl.expand_dims(g + (r - 3) >= 0, 1) & every
                window = window + (gl.load(px + (r - 3) * SL, mask=keep, other=0.0),)
            else:
                window = window + (gl.load(px + (r - 3) * SL),)
        w = ()
        for k in gl.static_range(8):
            w = w + (gl.expand_dims(gl.load(taps + k * C + c + ch), 0),)
        if DIAGONAL:
            if c < D:
                f_buffer.index((c // CH) % 2).store(gl.load(fc_at + c, mask=some, other=0.0))
        kept = ()
        for r in gl.static_range(8):
            p = window[r].to(gl.float32) * w[0] + w[7]
            for k in gl.static_range(1, 7):
                p += window[r + k].to(gl.float32) * w[k]
            half = 0.5 * p
            o = (half + half * _tanh(half)).to(gl.bfloat16)  # SiLU
            if MASK:
                gl.store(po + r * C, o, mask=gl.expand_dims(g + r < L, 1) & every)
            else:
                gl.store(po + r * C, o)
            kept = kept + (o,)
        if DIAGONAL:
            if c < D:
                a = gl.join(
                    gl.join(gl.join(kept[0], kept[4]), gl.join(kept[2], kept[6])),
                    gl.join(gl.join(kept[1], kept[5]), gl.join(kept[3], kept[7])),
                )
                buffer = a_buffer.index((c // CH) % 2)
                buffer.store(gl.reshape(gl.permute(a, (0, 2, 3, 4, 1)), (64, CH)))
                fence_async_shared()
                _barrier()
                acc = warpgroup_mma(buffer, f_buffer.index((c // CH) % 2).permute((1, 0)), acc)
        px += CH
        po += CH
    return acc


@gluon.jit(do_not_specialize=['L', 'H', 'tiles'])
def conv_diagonal_kernel(
    x,  # (B, L, C), rows of SL elements: x, B, C before the convolution
    taps,  # (8, C) float32: the seven weights and the bias
    fc,  # (H, D) bfloat16, where DIAGONAL
    Dv,  # (H,)
    out,  # (B, L, C) contiguous
    diag,  # (B, H, L) float32 out, where DIAGONAL: fc x + Dv of the result
    stride_b,
    L,
    H,
    tiles,
    SL: gl.constexpr,
    C: gl.constexpr,
    D: gl.constexpr,
    HP: gl.constexpr,  # heads, padded
    CH: gl.constexpr,
    DIAGONAL: gl.constexpr,
):
    """SiLU(conv(x)) and the diagonal in one pass: the product with fc takes a tile of channels from its registers."""
    layout: gl.constexpr = gl.BlockedLayout([1, CH // 32], [1, 32], [8, 1], [1, 0])
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, HP // 2, 16])
    fl: gl.constexpr = gl.BlockedLayout([1, 8], [256 // CH, CH // 8], [8, 1], [1, 0])
    b = gl.program_id(0) // tiles
    tile = gl.program_id(0) % tiles
    t0 = tile * 64
    a_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, CH], gl.bfloat16)
    f_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HP, CH], gl.bfloat16)
    a_buffer = gl.allocate_shared_memory(gl.bfloat16, [2, 64, CH], a_shared)
    f_buffer = gl.allocate_shared_memory(gl.bfloat16, [2, HP, CH], f_shared)
    x_b = x + b.to(gl.int64) * stride_b
    out_b = out + b.to(gl.int64) * (L * C)
    hh = gl.arange(0, HP, layout=gl.SliceLayout(1, fl))
    cc = gl.arange(0, CH, layout=gl.SliceLayout(0, fl))
    fc_at = fc + gl.expand_dims(hh * D, 1) + gl.expand_dims(cc, 0)
    some = gl.expand_dims(hh < H, 1) & gl.expand_dims(cc >= 0, 0)
    acc = gl.zeros((64, HP), gl.float32, mma)
    if t0 + 67 > L:
        acc = _conv_tile(
            x_b, taps, fc_at, some, out_b, a_buffer, f_buffer, acc, t0, L, SL, C, D, CH, layout, True, DIAGONAL
        )
    else:
        acc = _conv_tile(
            x_b, taps, fc_at, some, out_b, a_buffer, f_buffer, acc, t0, L, SL, C, D, CH, layout, False, DIAGONAL
        )
    if DIAGONAL:
        rm = t0 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
        hm = gl.arange(0, HP, layout=gl.SliceLayout(0, mma))
        acc += gl.expand_dims(gl.load(Dv + hm, mask=hm < H, other=0.0).to(gl.float32), 0)
        at = gl.expand_dims((b * H + hm).to(gl.int64) * L, 0) + gl.expand_dims(rm, 1)
        gl.store(diag + at, acc, mask=gl.expand_dims(hm < H, 0) & gl.expand_dims(rm < L, 1))


def convolve(
    x: Tensor, taps: Tensor, fc: Optional[Tensor], D: Tensor, out: Tensor, diag: Optional[Tensor], width: int
) -> None:
    """out (B, L, C) = SiLU(conv(x)); with fc (H, width) bfloat16 also diag (B, H, L) = fc out + D.

    Args:
        x: (B, L, C), rows of any stride.
        taps: (8, C) float32, weights and bias.
        width: Channels that fc multiplies.
    """
    B, L, C = x.shape
    H = D.shape[0]
    tiles = -(-L // 64)
    launch(conv_diagonal_kernel, (B * tiles,),
        x, taps, taps if fc is None else fc, D, out, taps if diag is None else diag, x.stride(0), L, H, tiles,
        SL=x.stride(1), C=C, D=width, HP=32 if H <= 32 else 64, CH=128 if H % 2 == 0 else 64, DIAGONAL=fc is not None,
        num_warps=8, maxnreg=128,
    )  # fmt: skip
