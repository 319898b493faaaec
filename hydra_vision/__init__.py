"""hydra_vision: Hydra-ViT vision backbones for timm. ``import hydra_vision`` registers the models."""

from .convert import swap_mixers
from .hub import push_to_hub, save_pretrained
from .mixers import Hydra
from .models import HydraViT
from .version import __version__

__all__ = ['Hydra', 'HydraViT', '__version__', 'push_to_hub', 'save_pretrained', 'swap_mixers']
