"""From a model's arguments to its mixers, and from a checkpoint's mixers to the model's."""

from functools import partial
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn

from .. import mixers

__all__ = ['mixer_factories', 'resample_mixer_parameter']


def mixer_factories(
    mixer: Union[str, Sequence[str]],
    options: Dict[str, Any],
    mixer_kwargs: Union[Mapping[str, Any], Sequence[Optional[Mapping[str, Any]]], None],
    *,
    depth: int,
    grid_size: Tuple[int, int],
    num_prefix_tokens: int,
    prefix_position: str,
    patch_drop_rate: float,
) -> List[Callable[..., nn.Module]]:
    """A callable (d_model, device=, dtype=) per block that makes its mixer.

    Args:
        mixer: Name of the mixer, or a pattern of names (`mixers.repeat_pattern`).
        options: The model's own arguments for its mixers, by the mixers' names. Each that is not None goes to the
            mixers that have it.
        mixer_kwargs: The mixers' arguments by their own names, or a pattern of them.
        depth: Number of blocks.
        grid_size: Patches that the model is made for.
        num_prefix_tokens: Class tokens.
        prefix_position: Where they stand.
        patch_drop_rate: Of the model.

    Raises:
        ValueError: An unknown mixer; an option that no mixer has, or that is in `mixer_kwargs` with another value;
            dropped patches with a mixer that has to know the grid.
        TypeError: `mixer_kwargs` holds something else than dicts, or a key that the mixer does not take.
    """
    options = {argument: value for argument, value in options.items() if value is not None}
    layout = dict(grid_size=grid_size, num_prefix_tokens=num_prefix_tokens, prefix_position=prefix_position)
    blocks = mixers.repeat_pattern(mixer, mixer_kwargs, depth)
    names = list(dict.fromkeys(name for name, _ in blocks))
    allowed = {name: mixers.arguments(name) for name in names}
    for argument, value in options.items():
        if not any(argument in allowed[name] for name in names):
            have = '; '.join(f'{name!r} takes: {", ".join(sorted(allowed[name]))}' for name in names)
            raise ValueError(f'{_option(argument)}={value}: no {argument} in mixer={mixer!r}; {have}')
    factories = []
    for name, given in blocks:
        for argument in layout:
            if argument in given:
                raise ValueError(
                    f'mixer_kwargs: {argument}={given[argument]}; the model knows its tokens, leave it out'
                )
        for argument, value in options.items():
            if argument in allowed[name] and given.setdefault(argument, value) != value:
                raise ValueError(f'{_option(argument)}={value}, but mixer_kwargs has {argument}={given[argument]}')
        known = mixers.layout_arguments(name, **given)
        if 'grid_size' in known and patch_drop_rate > 0:
            raise ValueError(
                f'patch_drop_rate={patch_drop_rate}: mixer={name!r} works on the grid of patches, none may be dropped'
            )
        factories.append(partial(mixers.create, name, **given, **{argument: layout[argument] for argument in known}))
    return factories


def _option(argument: str) -> str:
    """The model's name for a mixer's argument."""
    return 'mixer_bias' if argument == 'bias' else argument


def resample_mixer_parameter(key: str, value: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """A mixer's parameter from a checkpoint for another number of patches, at the model's; any other as it is.

    The checkpoint's grid is taken to be square. One that cannot be is left alone: loading names the size mismatch.
    """
    path, _, name = key.rpartition('.')
    try:
        mixer = model.get_submodule(path)
    except AttributeError:
        return value
    if not isinstance(mixer, mixers.MatrixMixer) or name not in mixer.grid_parameters():
        return value
    if value.shape == getattr(mixer, name).shape:
        return value
    old = mixer.old_tokens(name, value)
    return value if old is None else mixer.resample(name, value, old, mixer.tokens)
