"""Isotropic timm backbones as encoders of segmentation-models-pytorch (smp).

`smp.DPT('tu-hydra_vit_small', encoder_weights=None, decoder_readout='ignore')` takes our models as they are: it wants
maps of one stride. The decoders that come from CNNs (Unet, FPN, UPerNet, Segformer, DeepLabV3, ...) want strides 2, 4,
8, 16, 32: `register_smp_encoder` gives them those through a simple feature pyramid.
"""

from typing import Any

import torch
from torch import nn

from ..errors import require
from .pyramid import SimpleFeaturePyramid, isotropic_backbone, last_map

__all__ = ['PyramidEncoder', 'register_smp_encoder']


def register_smp_encoder(model_name: str, *, name: str = '', **kwargs: Any) -> str:
    """Make an isotropic timm model known to smp as an encoder.

    Args:
        model_name: E.g. 'hydra_vit_small', or 'local-dir:FOLDER' with `pretrained=True`.
        name: Under which smp shall know it, by default `model_name`.
        **kwargs: Of the model, `pretrained` included.

    Returns:
        The name, for `smp.Unet(name, encoder_weights=None)` and the like.

    Raises:
        ImportError: smp is not installed.
        ValueError: An unknown model, one that is not isotropic, a name that means another encoder to smp, in_chans.
    """
    encoders = require('segmentation_models_pytorch', 'seg').encoders.encoders
    if 'in_chans' in kwargs:
        raise ValueError('in_chans: smp counts the channels; pass in_channels= to its model')
    name = name or model_name
    taken = name in encoders and encoders[name]['encoder'] is not PyramidEncoder
    if taken or name.startswith(('tu-', 'timm-')):
        raise ValueError(f'name={name!r} means another encoder to smp; choose another name=')
    with torch.device('meta'):
        isotropic_backbone(model_name, **{**kwargs, 'pretrained': False})
    params = {'model_name': model_name, 'model_kwargs': kwargs}
    encoders[name] = {'encoder': PyramidEncoder, 'pretrained_settings': {}, 'params': params}
    return name


class PyramidEncoder(nn.Module):
    """What smp asks of an encoder: the image, then maps of strides 2, 4, ..., none coarser than output_stride."""

    _is_torch_scriptable = False
    _is_torch_exportable = True
    _is_torch_compilable = True

    def __init__(self, model_name: str, model_kwargs: dict[str, Any], depth: int = 5, output_stride: int = 32) -> None:
        """
        Args:
            model_name: An isotropic timm model.
            model_kwargs: Of the model.
            depth: Number of maps, 1 to 5.
            output_stride: Stride that no map exceeds; 8 or 16 for decoders with dilation.

        Raises:
            ValueError: A depth out of range.
        """
        super().__init__()
        if not 1 <= depth <= 5:
            raise ValueError(f'encoder_depth={depth}; allowed: 1 to 5')
        self._model_name, self._model_kwargs = model_name, model_kwargs
        self.model = isotropic_backbone(model_name, **model_kwargs)
        info = self.model.feature_info[-1]
        strides = [min(2**level, output_stride) for level in range(1, depth + 1)]
        # widths halve as the resolution doubles, as in a CNN
        channels = [max(info['num_chs'] * min(stride, 16) // 16, 8) for stride in strides]
        self.pyramid = SimpleFeaturePyramid(info['num_chs'], info['reduction'], strides=strides, out_channels=channels)
        self.out_channels = [3, *channels]
        self.output_stride = strides[-1]

    def set_in_channels(self, in_channels: int, pretrained: bool = True) -> None:
        """Called by smp once, after construction."""
        if in_channels != self.out_channels[0]:
            self.model = isotropic_backbone(self._model_name, in_chans=in_channels, **self._model_kwargs)
            self.out_channels = [in_channels, *self.out_channels[1:]]

    def make_dilated(self, output_stride: int) -> None:
        """Called by smp where it wants a smaller stride: the pyramid was built with it, no convolution changes."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(B, C, H, W) -> [x, maps of stride 2, 4, ...]."""
        return [x, *self.pyramid(last_map(self.model, x))]
