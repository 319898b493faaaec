"""Vision Mamba (Vim)

Paper:
* `Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model` -
    https://arxiv.org/abs/2401.09417 (ICML 2024)

Original code and weights: https://github.com/hustvl/Vim (Apache-2.0). The models are `HydraViT` with the mixer `vim`, a
class token in the middle of the patches that classifies, a learned position embedding, RMSNorm with eps 1e-5 and no
MLP. The residual stream is float32 under autocast as released, by the float32 position embedding. The released models
have a position for the class token as well; `checkpoint_filter_fn` adds it to the token, which is the same function.

The published ImageNet-1K checkpoints of the three widths load, with `pretrained=True` and
`pretrained_cfg_overlay=dict(file=FILE)`; their authors report 76.1, 80.5 and 81.9 % top-1 for them. No weights are
hosted here: every variant is tagged `untrained`. Checkpoints that were fine-tuned with a stride of 8 need overlapping
patches, which this patch embedding does not have.
"""

from functools import partial
from typing import Any, Dict

import torch
import torch.nn as nn
from timm.layers import RmsNorm, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from ..mixers import Mamba
from .hydra_vit import HydraViT, _cfg
from .hydra_vit import checkpoint_filter_fn as hydra_filter_fn

__all__ = ['VisionMamba']


class VisionMamba(HydraViT):
    """Vision Mamba

    A PyTorch impl of : `Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model`
        - https://arxiv.org/abs/2401.09417
    """

    def __init__(self, *args, norm_layer=None, **kwargs) -> None:
        """
        Args:
            norm_layer: Normalization layer; RMSNorm with eps 1e-5 by default.
            args: As in `HydraViT`.
            kwargs: As in `HydraViT`.
        """
        super().__init__(*args, norm_layer=norm_layer or partial(RmsNorm, eps=1e-5), **kwargs)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialize model weights as released: patch embedding and head trunc_normal(0.02), mixers as in PyTorch.

        The mixers' output projections are divided by the square root of the number of blocks.
        """
        super().init_weights(needs_reset)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.patch_embed.proj.weight, std=0.02)
        nn.init.zeros_(self.patch_embed.proj.bias)

    def _init_weights(self, m: nn.Module, needs_reset: bool = True) -> None:
        if m is self.head:
            super()._init_weights(m, needs_reset)
        elif needs_reset and hasattr(m, 'reset_parameters'):
            m.reset_parameters()
        if isinstance(m, Mamba):
            m.out_proj.reset_parameters()
            with torch.no_grad():
                m.out_proj.weight.div_(len(self.blocks) ** 0.5)


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: VisionMamba) -> Dict[str, torch.Tensor]:
    """Remap a checkpoint, released or ours: the position of the class token is added to the token."""
    state_dict = dict(state_dict.get('model', state_dict))
    pos_embed, cls_token = state_dict.get('pos_embed'), state_dict.get('cls_token')
    if pos_embed is not None and cls_token is not None:
        patches = pos_embed.shape[1] - 1
        side = round(patches**0.5)
        if patches > 0 and side * side == patches and pos_embed.shape[1] != model.pos_embed.shape[1]:
            middle = patches // 2
            state_dict['cls_token'] = cls_token + pos_embed[:, middle : middle + 1]
            state_dict['pos_embed'] = torch.cat([pos_embed[:, :middle], pos_embed[:, middle + 1 :]], dim=1)
    return hydra_filter_fn(state_dict, model)


def _create_vim(variant: str, pretrained: bool = False, **kwargs) -> VisionMamba:
    out_indices = kwargs.pop('out_indices', 3)
    model_args = dict(
        patch_size=16,
        depth=24,
        mixer='vim',
        pos_embed='learn',
        class_token=True,
        class_token_position='middle',
        global_pool='token',
    )
    return build_model_with_cfg(
        VisionMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **dict(model_args, **kwargs),
    )


default_cfgs = generate_default_cfgs(
    {
        'vim_tiny_patch16_224.untrained': _cfg(license='apache-2.0', fixed_input_size=True),
        'vim_small_patch16_224.untrained': _cfg(license='apache-2.0', fixed_input_size=True),
        'vim_base_patch16_224.untrained': _cfg(license='apache-2.0', fixed_input_size=True),
    }
)


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Vim-Ti. 7.15 M parameters."""
    return _create_vim('vim_tiny_patch16_224', pretrained=pretrained, **dict(dict(embed_dim=192), **kwargs))


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Vim-S. 25.8 M parameters."""
    return _create_vim('vim_small_patch16_224', pretrained=pretrained, **dict(dict(embed_dim=384), **kwargs))


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    """Vim-B. 97.6 M parameters."""
    return _create_vim('vim_base_patch16_224', pretrained=pretrained, **dict(dict(embed_dim=768), **kwargs))
