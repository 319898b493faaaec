"""The block: mixer and MLP with a LayerNorm in front and a residual sum behind.

Norm and sum are PyTorch's, and one kernel in eager half precision on CUDA: there a block hands on x and the branch that
is still to be added.
"""

from typing import Callable, Final, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, LayerType, Mlp, fast_layer_norm
from torch import Tensor

from ..mixers import Hydra
from ..mixers.base import is_plain, is_unwatched
from ..ops.dispatch import choose_backend
from ..ops.inner import scale_rows

__all__ = ['BlockNorm', 'Branch', 'HydraBlock', 'final_norm']

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


class HydraBlock(nn.Module):
    """x + drop_path(mixer(norm1(x))), followed by the MLP of a classic block where `mlp_ratio` is above 0."""

    takes_grid: Final[bool]

    def __init__(
        self,
        dim: int,
        mixer_layer: Callable,
        mlp_layer: Callable = Mlp,
        mlp_ratio: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: LayerType = LayerNorm,
        act_layer: LayerType = nn.GELU,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.mixer = mixer_layer(dim, **dd)
        self.takes_grid = self.mixer.takes_grid
        self.drop1 = nn.Dropout(proj_drop) if proj_drop > 0 else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        if mlp_ratio > 0:
            self.norm2 = norm_layer(dim, **dd)
            self.mlp = mlp_layer(dim, hidden_features=int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
            self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        else:
            self.norm2 = self.mlp = self.drop_path2 = None

    @torch.jit.unused
    def _mix_valid(self, x: Tensor, valid: Tensor) -> Tensor:
        return self.mixer(x, **self.mixer.padding_arguments(valid))

    @torch.jit.unused
    def fuses(self, x: Tensor) -> bool:
        """Whether sums are one kernel with the norm behind them: where the norms are, and nobody watches them."""
        if torch.compiler.is_compiling():
            return False
        norms = (self.norm1,) if self.mlp is None else (self.norm1, self.norm2)
        return all(is_plain(norm, BlockNorm) and norm.fuses(x) for norm in norms)

    @torch.jit.unused
    def forward_open(
        self,
        x: Tensor,
        branch: Optional[Branch],
        grid: Optional[Tuple[int, int]] = None,
    ) -> Tuple[Tensor, Branch]:
        """`forward` of x with the branch added, where the block `fuses`; its own last branch is left to be added."""
        x, y = self.norm1.after(x, branch)
        if is_unwatched(self.mixer, Hydra) and is_unwatched(self.drop1, nn.Identity):
            branch = Branch(*self.mixer.forward_late(y))
        else:
            branch = Branch(self.drop1(self.mixer(y, grid) if self.takes_grid else self.mixer(y)))
        branch = branch.dropped(self.drop_path1)
        if self.mlp is not None:
            x, y = self.norm2.after(x, branch)
            branch = Branch(self.mlp(y)).dropped(self.drop_path2)
        return x, branch

    @torch.jit.ignore
    def forward_packed(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """x (1, L, dim), several sequences with borders cu_seqlens (S + 1,); each is dropped or kept by itself."""
        segments = torch.repeat_interleave(cu_seqlens.diff())

        def dropped(path: nn.Module, y: Tensor) -> Tensor:
            return y * path(y.new_ones(len(cu_seqlens) - 1, 1))[segments] if isinstance(path, DropPath) else y

        y = self.mixer(self.norm1(x), **self.mixer.packing_arguments(cu_seqlens))
        x = x + dropped(self.drop_path1, self.drop1(y))
        if self.mlp is not None:
            x = x + dropped(self.drop_path2, self.mlp(self.norm2(x)))
        return x

    def forward(
        self,
        x: Tensor,
        grid: Optional[Tuple[int, int]] = None,
        valid: Optional[Tensor] = None,
    ) -> Tensor:
        """x (B, L, dim); grid: (H, W) of its patches, where they are not those the model was made for; valid: (B, L),
        False at padding, which stands last."""
        if not torch.jit.is_scripting() and valid is None and self.fuses(x):
            x, branch = self.forward_open(x, None, grid)
            return branch.added_to(x)
        if valid is not None:
            y = self._mix_valid(self.norm1(x), valid)
        elif self.takes_grid:
            y = self.mixer(self.norm1(x), grid)
        else:
            y = self.mixer(self.norm1(x))
        x = x + self.drop_path1(self.drop1(y))
        if self.mlp is not None:
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


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
