"""Operators: tensors in, tensors out. No nn.Module, no timm."""

from .dispatch import available_backends, set_default_backend
from .inner import hydra_inner
from .quasiseparable import quasiseparable_matrix, quasiseparable_mix

__all__ = [
    'available_backends',
    'hydra_inner',
    'quasiseparable_matrix',
    'quasiseparable_mix',
    'set_default_backend',
]
