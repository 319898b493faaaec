"""The LayerNorm in front of a block's mixer and MLP, and the residual sum before it.

Both are PyTorch's, and one kernel in eager half precision on CUDA.
"""

from typing import NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, fast_layer_norm
from torch import Tensor

from ..mixers.base import is_plain, is_unwatched
from ..ops.dispatch import choose_backend
from ..ops.inner import scale_rows

__all__ = ['BlockNorm', 'Branch', 'final_norm']

_MAX_WIDTH = 4096  # of the kernel
_HALVES = (torch.float16, torch.bfloat16)


class Branch(NamedTuple):
    """What is still to be added to the tokens: ``out``, its rows multiplied by ``factors`` where there are any."""

    out: Tensor  # (B, L, D)
    factors: Optional[Tensor] = None  # (B, L) float32, constant to autograd

    def dropped(self, drop_path: nn.Module) -> 'Branch':
        """After drop path, whose factor an image joins those of the rows."""
        if is_unwatched(drop_path, nn.Identity):
            return self
        if not is_unwatched(drop_path, DropPath):
            return Branch(drop_path(self.out if self.factors is None else scale_rows(self.out, self.factors)))
        if not drop_path.training:
            return self
        kept = drop_path(torch.ones(self.out.shape[0], 1, device=self.out.device))
        return Branch(self.out, kept.expand(self.out.shape[:2]) if self.factors is None else self.factors * kept)

    def added_to(self, x: Tensor) -> Tensor:
        """The sum."""
        if self.factors is None:
            return x + self.out
        from ..ops.triton.layernorm import add_rows  # lazily: importing hydra_vision must not import Triton

        return add_rows(x, self.out, self.factors)


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
    def fuses(self, x: Tensor) -> bool:
        """Whether the kernel is for this call."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy) or not x.is_cuda:
            return False
        affine = self.weight is not None and self.bias is not None
        fits = affine and _half(x) in _HALVES and self.weight.shape[0] <= _MAX_WIDTH
        return fits and choose_backend(self.backend, x.device) == 'triton'

    @torch.jit.unused
    def _fused(self, x: Tensor) -> Tensor:
        from ..ops.triton.layernorm import layer_norm  # lazily: importing hydra_vision must not import Triton

        return layer_norm(x, self.weight, self.bias, self.eps, _half(x))

    @torch.jit.unused
    def after(self, x: Tensor, branch: Optional[Branch]) -> Tuple[Tensor, Tensor]:
        """x with the branch added, and its norm; where the kernel ``fuses``."""
        if branch is None:
            return x, self._fused(x)
        from ..ops.triton.layernorm import add_layer_norm

        return add_layer_norm(x, *branch, self.weight, self.bias, self.eps, _half(x))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> the same shape."""
        if not torch.jit.is_scripting() and self.fuses(x):
            return self._fused(x)
        if self._fast_norm:
            return fast_layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def _half(x: Tensor) -> torch.dtype:
    """The dtype of a projection of x on CUDA."""
    return torch.get_autocast_dtype('cuda') if torch.is_autocast_enabled('cuda') else x.dtype


def final_norm(norm: nn.Module, x: Tensor, branch: Branch) -> Tensor:
    """``norm`` of the tokens behind the last block, where the kernels run: in the dtype that PyTorch gives it."""
    fits = is_plain(norm, LayerNorm) and norm.bias is not None and norm.weight.shape[0] <= _MAX_WIDTH
    if not fits or norm._fast_norm:
        return norm(branch.added_to(x))
    from ..ops.triton.layernorm import add_layer_norm

    dtype = torch.float32 if torch.is_autocast_enabled('cuda') else torch.promote_types(x.dtype, branch.out.dtype)
    return add_layer_norm(x, *branch, norm.weight, norm.bias, norm.eps, dtype)[1]
