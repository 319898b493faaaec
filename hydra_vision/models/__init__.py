"""Model families; importing this package registers them with timm."""

from . import m2_vit  # noqa: F401  registers its models
from .hydra_vit import HydraViT
from .vim import VisionMamba

__all__ = ['HydraViT', 'VisionMamba']
