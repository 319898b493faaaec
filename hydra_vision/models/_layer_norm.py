"""The LayerNorm in front of a block's mixer and MLP: timm's, and one kernel for it in eager half precision on CUDA."""

from typing import Optional

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, fast_layer_norm
from torch import Tensor

from ..ops.dispatch import choose_backend

__all__ = ['BlockNorm']

_MAX_WIDTH = 4096  # of the kernel
_HALVES = (torch.float16, torch.bfloat16)


class BlockNorm(LayerNorm):
    """timm's LayerNorm, for a result that goes into a projection.

    Under autocast LayerNorm casts to float32 and returns it, and the projection casts back. Where the Triton kernels
    run in eager mode, the same arithmetic (float32 inside) is one kernel that returns the half precision at once.
    """

    _fast_norm: torch.jit.Final[bool]

    def __init__(self, *args, backend: str = 'auto', **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.backend = backend

    @torch.jit.unused
    def _fused(self, x: Tensor) -> Optional[Tensor]:
        """The kernel's result; None where it is not for this call."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy) or not x.is_cuda:
            return None
        dtype = torch.get_autocast_dtype('cuda') if torch.is_autocast_enabled('cuda') else x.dtype
        affine = self.weight is not None and self.bias is not None
        fits = affine and dtype in _HALVES and self.weight.shape[0] <= _MAX_WIDTH
        if not fits or choose_backend(self.backend, x.device) != 'triton':
            return None
        from ..ops.triton.layernorm import layer_norm  # lazily: importing hydra_vision must not import Triton

        return layer_norm(x, self.weight, self.bias, self.eps, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> the same shape."""
        if not torch.jit.is_scripting():
            fused = self._fused(x)
            if fused is not None:
                return fused
        if self._fast_norm:
            return fast_layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
