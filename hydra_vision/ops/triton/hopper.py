"""What the Gluon kernels for Hopper share: arithmetic on pairs of bfloat16, fast functions, tensor maps."""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.8 has renamed it
_barrier = gl.barrier if hasattr(gl, 'barrier') else gl.thread_barrier


@gluon.jit
def _mul2(a, b):
    """bfloat16 product, two a register."""
    return gl.inline_asm_elementwise(
        'mul.bf16x2 $0, $1, $2;', '=r,r,r', [a, b], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def _mul2_packed(a, r):
    """bfloat16 a times r, int32 that hold the same bfloat16 twice."""
    return gl.inline_asm_elementwise(
        'mul.bf16x2 $0, $1, $2;', '=r,r,r,r', [a, r], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def _tanh(x):
    return gl.inline_asm_elementwise('tanh.approx.f32 $0, $1;', '=f,f', [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise('ex2.approx.ftz.f32 $0, $1;', '=f,f', [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _pack(r):
    """float32 -> int32 that holds it twice as bfloat16."""
    i = r.to(gl.bfloat16).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return i | (i << 16)


SIXTEEN = gl.NVMMASharedLayout(32, 16, 2)
WHOLE = gl.NVMMASharedLayout(128, 16, 2)
BATCHED = gl.NVMMASharedLayout(128, 16, 3)
PLAIN = gl.NVMMASharedLayout(0, 32, 2)


def _rows_of(t: Tensor, width: int, rows: int = 64) -> TensorDescriptor:
    """(B, L, width) of a tensor with longer rows, in boxes of ``rows`` rows and 64 columns."""
    B, L = t.shape[:2]
    return TensorDescriptor(t, [B, L, width], [t.stride(0), t.stride(1), 1], [1, rows, 64], BATCHED)


def _flat(t: Tensor, rows: int, columns: int, layout: gl.NVMMASharedLayout) -> TensorDescriptor:
    width = t.shape[-1]
    return TensorDescriptor(t, [t.numel() // width, width], [width, 1], [rows, columns], layout)
