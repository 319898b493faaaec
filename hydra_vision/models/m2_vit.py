"""M2-ViT

Paper:
* `Monarch Mixer: A Simple Sub-Quadratic GEMM-Based Architecture` - https://arxiv.org/abs/2310.12109 (NeurIPS 2023)

A ViT with gated long convolutions instead of attention and block-diagonal MLPs. Its vision code was never released: the
model is `HydraViT` with the wrapper and the filters of the released language models (HazyResearch/m2), without their
second long convolution.
"""

from timm.models import generate_default_cfgs, register_model

from .hydra_vit import HydraViT, _cfg, _create_hydra_vit

__all__ = []

default_cfgs = generate_default_cfgs({'m2_vit_base.untrained': _cfg()})


@register_model
def m2_vit_base(pretrained: bool = False, **kwargs) -> HydraViT:
    """M2-ViT-Base. 47.2 M parameters; the paper says 45 M."""
    model_args = dict(
        patch_size=16,
        embed_dim=768,
        depth=12,
        mixer='m2',
        mixer_kwargs=dict(wrapper='m2', residual_conv=False),
        mlp='blockdiag',
        mlp_ratio=4.0,
    )
    return _create_hydra_vit('m2_vit_base', pretrained=pretrained, **dict(model_args, **kwargs))
