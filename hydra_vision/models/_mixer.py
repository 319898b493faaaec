"""From a model's arguments to its mixers, and from a checkpoint's mixers to the model's."""

import inspect
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
    model: Callable,
    grid_size: Tuple[int, int],
    num_prefix_tokens: int,
    prefix_position: str,
    patch_drop_rate: float,
) -> List[Callable[..., nn.Module]]:
    """A callable (d_model, device=, dtype=) per block that makes its mixer.

    Args:
        mixer: Name of the mixer, or a pattern of names (`mixers.repeat_pattern`).
        options: The model's own arguments for its mixers, by name. Each goes to the mixers that have it.
        mixer_kwargs: The mixers' arguments by their own names, or a pattern of them.
        depth: Number of blocks.
        model: The model's class, whose signature says what the defaults of `options` are.
        grid_size: Patches that the model is made for.
        num_prefix_tokens: Class tokens.
        prefix_position: Where they stand.
        patch_drop_rate: Of the model.

    Raises:
        ValueError: An unknown mixer; an option with another value than its default that no mixer has, or that is in
            `mixer_kwargs` as well; dropped patches with a mixer that has to know the grid.
        TypeError: `mixer_kwargs` holds something else than dicts, or a key that the mixer does not take.
    """
    defaults = inspect.signature(model).parameters
    changed = {
        option
        for option, value in options.items()
        if value != (tuple(defaults[option].default) if isinstance(value, tuple) else defaults[option].default)
    }
    options = {'bias' if option == 'mixer_bias' else option: (option, value) for option, value in options.items()}
    layout = dict(grid_size=grid_size, num_prefix_tokens=num_prefix_tokens, prefix_position=prefix_position)
    blocks = mixers.repeat_pattern(mixer, mixer_kwargs, depth)
    names = list(dict.fromkeys(name for name, _ in blocks))
    allowed = {name: mixers.arguments(name) for name in names}
    for argument, (option, value) in options.items():
        if option in changed and not any(argument in allowed[name] for name in names):
            have = '; '.join(f'{name!r} takes: {", ".join(sorted(allowed[name]))}' for name in names)
            raise ValueError(f'{option}={value}: no {argument} in mixer={mixer!r}; {have}')
    factories = []
    for name, given in blocks:
        for argument in layout:
            if argument in given:
                raise ValueError(
                    f'mixer_kwargs: {argument}={given[argument]}; the model knows its tokens, leave it out'
                )
        for argument, (option, value) in options.items():
            if argument not in allowed[name]:
                continue
            if given.setdefault(argument, value) != value and option in changed:
                raise ValueError(f'{option}={value}, but mixer_kwargs has {argument}={given[argument]}')
        known = mixers.layout_arguments(name, **given)
        if 'grid_size' in known and patch_drop_rate > 0:
            raise ValueError(
                f'patch_drop_rate={patch_drop_rate}: mixer={name!r} works on the grid of patches, none may be dropped'
            )
        factories.append(partial(mixers.create, name, **given, **{argument: layout[argument] for argument in known}))
    return factories


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
