"""Causal depthwise convolution with SiLU, forward and backward, in either direction: seven taps of which some are zero.

The kernels are those of the models' centred convolution (conv.py), which read each row once: taps that are zero cost
no bytes.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .conv import conv7_backward_kernel, conv7_kernel
from .function import refuse_transforms
from .inner import BACKWARD_LANES, LANES, SEGMENT
from .launch import launch
from .plan import alignment, fast_math

__all__ = ['MAX_WIDTH', 'causal_conv_silu']

MAX_WIDTH = 4  # the present token and three others: half of seven taps


def _padded(weight: Tensor, reverse: bool) -> Tensor:
    """(C, 1, K), the last column for the present token -> (C, 7) around it."""
    weight = weight.squeeze(1)
    K = weight.shape[1]
    return F.pad(weight.flip(1), (3, 4 - K)) if reverse else F.pad(weight, (4 - K, 3))


@torch.library.custom_op('hydra_vision::causal_conv_silu', mutates_args=(), tags=(torch.Tag.flexible_layout,))
def _forward(x: Tensor, taps: Tensor, bias: Optional[Tensor]) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, L, C = x.shape
    out = torch.empty(batch, L, C, dtype=x.dtype, device=x.device)
    if batch:
        launch(conv7_kernel, (triton.cdiv(C, LANES) * triton.cdiv(L, SEGMENT) * batch,),
            x, taps, taps if bias is None else bias, out, x.stride(0), x.stride(1), L, C, SEGMENT, BC=LANES,
            HAS_BIAS=bias is not None, ALIGN=alignment(x, x.stride(0), x.stride(1)), num_warps=4, num_stages=1,
        )  # fmt: skip
    return out


@_forward.register_fake
def _(x, taps, bias):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op('hydra_vision::causal_conv_silu_backward', mutates_args=(), tags=(torch.Tag.flexible_layout,))
def _backward(g: Tensor, x: Tensor, taps: Tensor, bias: Optional[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the taps and of the bias (meaningless where there is none)."""
    x, g = x if x.stride(-1) == 1 else x.contiguous(), g.contiguous()
    batch, L, C = x.shape
    dx = torch.empty(batch, L, C, dtype=x.dtype, device=x.device)
    segments = triton.cdiv(L, SEGMENT)
    part = torch.empty(batch, segments, 8, C, dtype=torch.float32, device=x.device)
    if batch:
        launch(conv7_backward_kernel, (triton.cdiv(C, BACKWARD_LANES) * segments * batch,),
            x, taps, taps if bias is None else bias, g, dx, part, x.stride(0), dx.stride(0), L, SEGMENT,
            SU=x.stride(1), SD=dx.stride(1), C=C, BC=BACKWARD_LANES, HAS_BIAS=bias is not None,
            FAST=fast_math(x.dtype, x.device), num_warps=4, num_stages=1,
        )  # fmt: skip
    sums = part.sum((0, 1))
    return dx, sums[:7].T.contiguous(), sums[7].clone()


@_backward.register_fake
def _(g, x, taps, bias):
    C = x.shape[2]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, dx.new_empty(C, 7, dtype=torch.float32), dx.new_empty(C, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    x, taps, bias = ctx.saved_tensors
    dx, dtaps, dbias = _backward(g, x, taps, bias)
    return dx, dtaps.to(taps.dtype), None if bias is None else dbias.to(bias.dtype)


_forward.register_autograd(_gradients, setup_context=_keep)


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Optional[Tensor], reverse: bool = False) -> Tensor:
    """SiLU(convolution) (B, L, C), dtype of x.

    Args:
        x: (B, L, C), float16, bfloat16 or float32.
        weight: (C, 1, K), K <= ``MAX_WIDTH``; the last column meets the present token.
        bias: (C,) or None.
        reverse: The others are the tokens behind it instead of those before it.

    Raises:
        RuntimeError: Inside a transform of torch.func.
    """
    refuse_transforms()
    return _forward(x, _padded(weight, reverse).contiguous(), bias)
