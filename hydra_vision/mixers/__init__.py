"""Sequence mixers: nn.Modules (B, L, d_model) -> (B, L, d_model), each with ``matrix(u)``.

``create('toeplitz', 192, data_dependent=True)`` makes one by name, ``list_mixers()`` names them all,
``arguments(name)`` says what a mixer takes. See docs/mixers.md.
"""

from .attention import Attention, VitAttention
from .base import MatrixMixer, Mixer
from .cross import HydraCross
from .dense import Dense, Fourier
from .hydra import Hydra
from .mamba import Mamba, Vim
from .monarch import BlockDiagonalLinear, LongConv, Monarch, MonarchLinear, StructuredMlp
from .pairwise import Cauchy, Vandermonde
from .query_key import LowRank
from .registry import arguments, create, layout_arguments, list_mixers, needs_grid, pattern_table, repeat_pattern
from .scout import CheckpointAttention, Scout
from .semiseparable import Quasiseparable, Semiseparable
from .toeplitz import Toeplitz

__all__ = [
    'Attention',
    'BlockDiagonalLinear',
    'Cauchy',
    'CheckpointAttention',
    'Dense',
    'Fourier',
    'Hydra',
    'HydraCross',
    'LongConv',
    'LowRank',
    'Mamba',
    'MatrixMixer',
    'Mixer',
    'Monarch',
    'MonarchLinear',
    'Quasiseparable',
    'Scout',
    'Semiseparable',
    'StructuredMlp',
    'Toeplitz',
    'Vandermonde',
    'Vim',
    'VitAttention',
    'arguments',
    'create',
    'layout_arguments',
    'list_mixers',
    'needs_grid',
    'pattern_table',
    'repeat_pattern',
]
