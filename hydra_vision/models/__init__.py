"""Model families; importing this package registers them with timm."""

from .hydra_vit import HydraViT

__all__ = ['HydraViT']
