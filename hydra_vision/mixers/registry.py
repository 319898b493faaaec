"""Every mixer by name."""

import difflib
import inspect
from typing import Any, Dict, List, Tuple, Type

import torch.nn as nn

from .attention import Attention, VitAttention
from .dense import Dense, Fourier
from .hydra import Hydra
from .monarch import LongConv, Monarch
from .pairwise import Cauchy, Vandermonde
from .query_key import LowRank
from .semiseparable import Quasiseparable, Semiseparable
from .toeplitz import Toeplitz

__all__ = ['arguments', 'create', 'list_mixers', 'mixer_class', 'needs_grid']

MIXERS: Dict[str, Type[nn.Module]] = {
    'hydra': Hydra,
    'attention': Attention,
    'cauchy': Cauchy,
    'dense': Dense,
    'dft': Fourier,
    'low_rank': LowRank,
    'm2': LongConv,
    'monarch': Monarch,
    'quasiseparable': Quasiseparable,
    'semiseparable': Semiseparable,
    'toeplitz': Toeplitz,
    'vandermonde': Vandermonde,
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
        raise ValueError(f'mixer = {name!r}{_nearest(name, list_mixers())}; allowed: {", ".join(list_mixers())}')
    return MIXERS[name]


def arguments(name: str) -> Dict[str, Any]:
    """Keyword arguments of a mixer, with their defaults; without d_model, device and dtype."""
    found: Dict[str, Any] = {}
    hidden = getattr(mixer_class(name), 'hidden_arguments', ())
    for cls in mixer_class(name).__mro__:
        if '__init__' not in vars(cls):
            continue
        parameters = list(inspect.signature(cls.__init__).parameters.values())
        for p in parameters[1:]:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in ('d_model', 'device', 'dtype'):
                found.setdefault(p.name, p.default)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return {argument: default for argument, default in found.items() if argument not in hidden}


def needs_grid(name: str, **kwargs) -> bool:
    """Whether this mixer has parameters a token, and so needs ``grid_size`` (and takes ``num_prefix_tokens``)."""
    tied = getattr(mixer_class(name), 'per_token', 'never')
    return tied == 'always' or (tied == 'optional' and not kwargs.get('data_dependent', True))


def check_arguments(name: str, given: Tuple[str, ...]) -> None:
    """Raises TypeError for an argument that the mixer does not take, naming the nearest one."""
    allowed = arguments(name)
    for argument in given:
        if argument not in allowed:
            raise TypeError(
                f'mixer {name!r} takes no argument {argument!r}{_nearest(argument, list(allowed))}; '
                f'it takes: {", ".join(sorted(allowed))}'
            )


def create(name: str, d_model: int, *, device=None, dtype=None, **kwargs) -> nn.Module:
    """A mixer (B, L, d_model) -> (B, L, d_model) by name.

    Args:
        name: One of ``list_mixers()``.
        d_model: Width of the tokens.
        device: Of the parameters.
        dtype: Of the parameters.
        **kwargs: The mixer's own arguments (``arguments(name)``).

    Raises:
        ValueError: No such mixer, or a value that it refuses.
        TypeError: An argument that it does not take.
    """
    cls = mixer_class(name)
    check_arguments(name, tuple(kwargs))
    return cls(d_model, device=device, dtype=dtype, **kwargs)


def _nearest(name: str, names: List[str]) -> str:
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    return f' (did you mean {close[0]!r}?)' if close else ''
