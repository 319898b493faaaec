"""Sequence mixers: nn.Modules (B, L, d_model) -> (B, L, d_model)."""

from .hydra import Hydra

__all__ = ['Hydra']
