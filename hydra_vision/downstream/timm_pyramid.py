"""A pyramid under a name that timm knows, for clients that build their backbone by `timm.create_model(name, ...)`.

transformers' `TimmBackbone` is one: it passes on no arguments of the model, so what an isotropic backbone needs for
dense prediction (any image size, maps of several strides) has to be part of the name.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models import FeatureInfo, register_model
from torch import nn

from .pyramid import SimpleFeaturePyramid, isotropic_backbone, last_map

__all__ = ['PyramidFeatures', 'register_pyramid']


class PyramidFeatures(nn.Module):
    """What `features_only=True` gives for a model with stages: images -> a list of maps, `feature_info`."""

    def __init__(
        self, model: nn.Module, *, strides: Sequence[int], out_channels: int, out_indices: Sequence[int]
    ) -> None:
        """
        Args:
            model: From `isotropic_backbone`.
            strides: Of all levels.
            out_channels: Of every level.
            out_indices: The levels that are returned, finest first; negative ones count from the coarsest.

        Raises:
            ValueError: An index out of range.
        """
        super().__init__()
        wrong = [i for i in out_indices if not -len(strides) <= i < len(strides)]
        if wrong:
            raise ValueError(f'out_indices={list(out_indices)}; the pyramid has {len(strides)} levels')
        info = model.feature_info[-1]
        indices = [i % len(strides) for i in out_indices]
        self.model = model
        self.pyramid = SimpleFeaturePyramid(
            info['num_chs'], info['reduction'], strides=[strides[i] for i in indices], out_channels=out_channels
        )
        self.feature_info = FeatureInfo(
            [dict(module=f'level{i}', num_chs=out_channels, reduction=s) for i, s in enumerate(strides)], indices
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(B, C, H, W) -> one map (B, out_channels, h, w) a level of out_indices."""
        return self.pyramid(last_map(self.model, x))


def register_pyramid(
    model_name: str,
    *,
    name: str | None = None,
    strides: Sequence[int] = (4, 8, 16, 32),
    out_channels: int = 256,
    **kwargs: Any,
) -> str:
    """Register `features_only` models: an isotropic timm model below a simple feature pyramid, at any image size.

    Args:
        model_name: The backbone.
        name: Of the new model, by default `model_name` + '_pyramid'.
        strides: Of the levels.
        out_channels: Of every level.
        **kwargs: Of the backbone.

    Returns:
        The name, for `timm.create_model(name, features_only=True)` and `TimmBackboneConfig(backbone=name)`. The name
        lives as long as the process: register it again before a saved model that uses it is opened.

    Raises:
        ValueError: An unknown model, one that is not isotropic, or a name that timm uses already.
    """
    with torch.device('meta'):
        isotropic_backbone(model_name, **{**kwargs, 'pretrained': False})
    name = name or f'{model_name}_pyramid'
    if not name.isidentifier():
        raise ValueError(f'name={name!r}; it must be an identifier')
    if timm.is_model(name) and not hasattr(timm.models.model_entrypoint(name), 'pyramid_of'):
        raise ValueError(f'name={name!r} is a model of timm already; choose another name=')

    def entry(pretrained: bool = False, features_only: bool = False, **given: Any) -> PyramidFeatures:
        if not features_only:
            raise ValueError(f'{name!r} has no classifier: pass features_only=True')
        for key in ('pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir'):
            given.pop(key, None)
        if given.pop('output_stride', None) not in (None, 32):
            raise ValueError(f'{name!r} has no output_stride; register the strides that are wanted')
        indices = given.pop('out_indices', tuple(range(len(strides))))
        indices = range(-indices, 0) if isinstance(indices, int) else indices
        model = isotropic_backbone(model_name, pretrained=pretrained, **{**kwargs, **given})
        return PyramidFeatures(model, strides=strides, out_channels=out_channels, out_indices=tuple(indices))

    entry.__name__, entry.pyramid_of = name, model_name
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # again, perhaps with other arguments: checked above
        register_model(entry)
    if name in __all__:
        __all__.remove(name)  # the registry lists it, but it is no attribute of this module
    return name
