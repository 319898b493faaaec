"""Every mixer by name."""

from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Type, Union

import torch.nn as nn

from ..errors import nearest
from .attention import Attention, VitAttention
from .base import PATTERNS, check_arguments, keyword_arguments
from .cross import HydraCross
from .dense import Dense, Fourier
from .hydra import Hydra
from .mamba import Mamba, Vim
from .monarch import LongConv, Monarch
from .pairwise import Cauchy, Vandermonde
from .query_key import LowRank
from .scout import CheckpointAttention, Scout
from .semiseparable import Quasiseparable, Semiseparable
from .toeplitz import Toeplitz

__all__ = [
    'arguments',
    'create',
    'layout_arguments',
    'list_mixers',
    'mixer_class',
    'needs_grid',
    'pattern_table',
    'repeat_pattern',
]

MIXERS: Dict[str, Type[nn.Module]] = {
    'hydra': Hydra,
    'attention': Attention,
    'cauchy': Cauchy,
    'checkpoint': CheckpointAttention,
    'dense': Dense,
    'dft': Fourier,
    'low_rank': LowRank,
    'm2': LongConv,
    'mamba': Mamba,
    'monarch': Monarch,
    'quasiseparable': Quasiseparable,
    'scout': Scout,
    'semiseparable': Semiseparable,
    'toeplitz': Toeplitz,
    'vandermonde': Vandermonde,
    'vim': Vim,
    'vit_attention': VitAttention,
}


def list_mixers() -> List[str]:
    """Names that ``create`` takes."""
    return sorted(MIXERS)


def mixer_class(name: str) -> Type[nn.Module]:
    """The class behind a name.

    Raises:
        ValueError: No such mixer; the message has the nearest name.
    """
    if name not in MIXERS:
        raise ValueError(f'mixer={name!r}{nearest(name, list_mixers())}; allowed: {", ".join(list_mixers())}')
    return MIXERS[name]


def arguments(name: str) -> Dict[str, Any]:
    """Keyword arguments of a mixer, with their defaults; without d_model, device and dtype."""
    return keyword_arguments(mixer_class(name))


def pattern_table() -> List[Tuple[str, ...]]:
    """Header and rows of a table: which of ``PATTERNS`` each mixer supports, and with which arguments."""
    rows = [('mixer', *PATTERNS)]
    for name, cls in [*sorted(MIXERS.items()), ('HydraCross', HydraCross)]:
        cells = []
        for pattern in PATTERNS:
            needed = cls.patterns.get(pattern)
            given = '' if needed is None else ', '.join(f'{key}={value!r}' for key, value in needed.items())
            cells.append('no' if needed is None else given or 'yes')
        rows.append((name, *cells))
    return rows


def layout_arguments(name: str, **kwargs) -> Tuple[str, ...]:
    """Which of ``grid_size``, ``num_prefix_tokens`` and ``prefix_position`` this mixer takes, given its arguments."""
    return mixer_class(name).layout_arguments(kwargs)


def needs_grid(name: str, **kwargs) -> bool:
    """Whether this mixer has to know the grid of the patches, and so needs ``grid_size``."""
    return 'grid_size' in layout_arguments(name, **kwargs)


def repeat_pattern(
    mixer: Union[str, Sequence[str]],
    mixer_kwargs: Union[Mapping[str, Any], Sequence[Optional[Mapping[str, Any]]], None],
    depth: int,
) -> List[Tuple[str, Dict[str, Any]]]:
    """Name and arguments of the mixer of each block.

    Args:
        mixer: A name; or names that repeat, as many as divide ``depth``.
        mixer_kwargs: Arguments, the same for all blocks; or a sequence of them that repeats likewise.
        depth: Number of blocks.

    Raises:
        ValueError: No such mixer, or a pattern that does not fit into ``depth``.
        TypeError: ``mixer`` holds no names, ``mixer_kwargs`` no dicts, or a mixer does not take a key.
    """
    names = [mixer] if isinstance(mixer, str) else mixer
    kwargs = [mixer_kwargs] if mixer_kwargs is None or isinstance(mixer_kwargs, Mapping) else mixer_kwargs
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f'mixer={mixer!r}; it must be a name or a sequence of names')
    if not isinstance(kwargs, (list, tuple)) or not all(isinstance(k, (Mapping, type(None))) for k in kwargs):
        raise TypeError(f'mixer_kwargs={mixer_kwargs!r}; it must be a dict or a sequence of dicts')
    for argument, value, pattern in (('mixer', mixer, names), ('mixer_kwargs', mixer_kwargs, kwargs)):
        if not pattern or depth % len(pattern):
            raise ValueError(f'{argument}={value!r}: a pattern of {len(pattern)} does not divide depth={depth}')
    blocks = [(names[i % len(names)], dict(kwargs[i % len(kwargs)] or {})) for i in range(depth)]
    for name, given in blocks:
        check_arguments(f'mixer={name!r}', mixer_class(name), given)
    return blocks


def create(name: str, d_model: int, *, device=None, dtype=None, **kwargs) -> nn.Module:
    """A mixer (B, L, d_model) -> (B, L, d_model) by name.

    Args:
        name: One of ``list_mixers()``.
        d_model: Width of the tokens.
        device: Of the parameters.
        dtype: Of the parameters.
        **kwargs: The mixer's own arguments (``arguments(name)``).

    Raises:
        ValueError: No such mixer, or a value that it does not allow.
        TypeError: An argument that it does not take.
    """
    cls = mixer_class(name)
    check_arguments(f'mixer={name!r}', cls, kwargs)
    return cls(d_model, device=device, dtype=dtype, **kwargs)
