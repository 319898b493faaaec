"""Feature maps of several strides from the one map of an isotropic backbone."""

from collections.abc import Sequence

import timm
import torch
from timm.layers import LayerNorm2d
from torch import nn

from ..errors import nearest

__all__ = ['SimpleFeaturePyramid', 'isotropic_backbone', 'last_map']


class SimpleFeaturePyramid(nn.Module):
    """The simple feature pyramid of ViTDet (Li et al., https://arxiv.org/abs/2203.16527, section 3).

    Every level comes from the last map of the backbone: deconvolutions towards finer strides, max pooling towards
    coarser ones, then a 1 x 1 and a 3 x 3 convolution with LayerNorm.
    """

    def __init__(
        self,
        dim: int,
        in_stride: int = 16,
        *,
        strides: Sequence[int] = (4, 8, 16, 32),
        out_channels: int | Sequence[int] = 256,
        pool: bool = False,
    ) -> None:
        """
        Args:
            dim: Channels of the input map.
            in_stride: Pixels per cell of the input map, the patch size of the backbone.
            strides: Pixels per cell of each level, in_stride times a power of two (positive or negative).
            out_channels: Channels of every level, or one number per level.
            pool: Add one more level, the coarsest one subsampled by 2 ('pool', for the proposals of large objects).

        Raises:
            ValueError: A stride that is no power of two away from in_stride, or the wrong number of channels.
        """
        super().__init__()
        if isinstance(out_channels, int):
            out_channels = (out_channels,) * len(strides)
        if len(out_channels) != len(strides) or not strides:
            raise ValueError(f'out_channels={tuple(out_channels)}; it must have one entry per stride of {strides}')
        self.strides = tuple(strides)
        self.out_channels = tuple(out_channels)
        self.pool = nn.MaxPool2d(kernel_size=1, stride=2) if pool else None
        self.levels = nn.ModuleList(
            nn.Sequential(*_resize(dim, in_stride, stride), *_project(_width(dim, in_stride, stride), channels))
            for stride, channels in zip(strides, out_channels)
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(B, dim, H, W) -> one map per level, finest stride first as given: (B, C, h, w) of the stride."""
        maps = [level(x) for level in self.levels]
        return maps if self.pool is None else [*maps, self.pool(maps[-1])]


def _steps(in_stride: int, stride: int) -> int:
    """How often the resolution doubles (negative: halves) from in_stride to stride."""
    ratio = max(in_stride, stride) // min(in_stride, stride)
    if max(in_stride, stride) % min(in_stride, stride) or ratio & (ratio - 1):
        raise ValueError(f'stride {stride} is no power of two away from in_stride={in_stride}')
    steps = ratio.bit_length() - 1
    return steps if stride < in_stride else -steps


def _width(dim: int, in_stride: int, stride: int) -> int:
    return max(dim >> max(_steps(in_stride, stride), 0), 8)


def _resize(dim: int, in_stride: int, stride: int) -> list[nn.Module]:
    steps = _steps(in_stride, stride)
    layers: list[nn.Module] = [nn.MaxPool2d(2)] * max(-steps, 0)
    for step in range(max(steps, 0)):
        if step:
            layers += [LayerNorm2d(max(dim >> step, 8)), nn.GELU()]
        layers.append(nn.ConvTranspose2d(max(dim >> step, 8), max(dim >> (step + 1), 8), kernel_size=2, stride=2))
    return layers


def _project(width: int, channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(width, channels, kernel_size=1, bias=False),
        LayerNorm2d(channels),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(channels),
    ]


def isotropic_backbone(name: str, *, in_chans: int = 3, pretrained: bool = False, **kwargs) -> nn.Module:
    """A timm model that serves dense prediction: no head, any image size that the patch divides.

    Args:
        name: A timm model whose blocks all have one stride, or 'local-dir:...', 'hf-hub:...'.
        in_chans: Channels of the images.
        pretrained: Load the weights of that name.
        **kwargs: Of the model.

    Raises:
        ValueError: An unknown name, or a model with several strides.
    """
    if ':' not in name and not timm.is_model(name):
        raise ValueError(f'unknown model {name!r}{nearest(name, timm.list_models())}')
    kwargs.setdefault('dynamic_img_size', True)
    try:
        model = timm.create_model(
            name, pretrained=pretrained, in_chans=in_chans, num_classes=0, global_pool='', **kwargs
        )
    except TypeError as error:
        raise ValueError(f'model {name!r} cannot be built as an isotropic backbone with {kwargs}: {error}') from error
    strides = {info['reduction'] for info in getattr(model, 'feature_info', [])}
    if len(strides) != 1 or not hasattr(model, 'forward_intermediates'):
        raise ValueError(f'model {name!r} is not isotropic (strides {sorted(strides)}); it has its own pyramid')
    return model


def last_map(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The normalised map of the last block: (B, C, H, W) -> (B, embed_dim, h, w)."""
    return model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[-1]
