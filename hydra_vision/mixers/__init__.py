"""Sequence mixers: nn.Modules (B, L, d_model) -> (B, L, d_model), each with ``matrix(u)``.

``create('toeplitz', 192, data_dependent=True)`` makes one by name, ``list()`` names them all, ``arguments(name)`` says
what a mixer takes. See docs/mixers.md.
"""

from .base import MatrixMixer
from .hydra import Hydra
from .registry import arguments, count_parameters, create, match_parameters, needs_grid
from .registry import list_mixers as list

__all__ = [
    'Hydra',
    'MatrixMixer',
    'arguments',
    'count_parameters',
    'create',
    'list',
    'match_parameters',
    'needs_grid',
]
