"""Pictures of what a model computes. matplotlib loads where a picture is drawn."""

from .features import pca_rgb, similarity_map
from .gradcam import grad_cam, reshape_transform
from .matrix import mixing_matrices
from .receptive_field import effective_receptive_field

__all__ = [
    'effective_receptive_field',
    'grad_cam',
    'mixing_matrices',
    'pca_rgb',
    'reshape_transform',
    'similarity_map',
]
