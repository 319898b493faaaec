"""Model families; importing this package registers them with timm."""

from .hydra_vit import HydraViT
from .vim import VisionMamba

__all__ = ['HydraViT', 'VisionMamba']
