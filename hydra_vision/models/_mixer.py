"""From a model's arguments to its mixers, and from a checkpoint's mixers to the model's."""

import inspect
from functools import partial
from typing import Any, Callable, Dict, Optional, Tuple

import torch
import torch.nn as nn

from .. import mixers

__all__ = ['mixer_factory', 'resample_mixer_parameter']


def mixer_factory(
    mixer: str,
    options: Dict[str, Any],
    mixer_kwargs: Optional[Dict[str, Any]],
    *,
    model: Callable,
    grid_size: Tuple[int, int],
    num_prefix_tokens: int,
    prefix_position: str,
    patch_drop_rate: float,
) -> Callable[..., nn.Module]:
    """A callable (d_model, device=, dtype=) that makes the mixer of one block.

    Args:
        mixer: A name of `hydra_vision.mixers.list()`.
        options: The model's own arguments for its mixer, by name. Those that this mixer takes go to it.
        mixer_kwargs: The mixer's arguments by their own names.
        model: The model's class, whose signature says what the defaults of `options` are.
        grid_size: Patches that the model is made for.
        num_prefix_tokens: Class tokens.
        prefix_position: Where they stand.
        patch_drop_rate: Of the model.

    Raises:
        ValueError: An unknown mixer; an option with another value than its default that the mixer does not have, or
            that is in `mixer_kwargs` as well; dropped patches with a mixer that has parameters for each patch.
        TypeError: `mixer_kwargs` is no dict, or has a key that the mixer does not take.
    """
    if not isinstance(mixer_kwargs, (dict, type(None))):
        raise TypeError(f'mixer_kwargs = {mixer_kwargs!r}; it must be a dict')
    given = dict(mixer_kwargs or {})
    for argument in ('grid_size', 'num_prefix_tokens', 'prefix_position'):
        if argument in given:
            raise ValueError(f'mixer_kwargs: {argument} = {given[argument]}; the model knows its tokens, leave it out')
    defaults = inspect.signature(model).parameters
    changed = {
        option
        for option, value in options.items()
        if value != (tuple(defaults[option].default) if isinstance(value, tuple) else defaults[option].default)
    }
    options = {'bias' if option == 'mixer_bias' else option: (option, value) for option, value in options.items()}
    allowed = mixers.arguments(mixer)
    for argument, (option, value) in options.items():
        if argument not in allowed:
            if option in changed:
                raise ValueError(
                    f'{option} = {value}: the mixer {mixer!r} has no {argument}; it takes: {", ".join(sorted(allowed))}'
                )
        elif argument not in given:
            given[argument] = value
        elif option in changed and given[argument] != value:
            raise ValueError(f'{option} = {value}, but mixer_kwargs has {argument} = {given[argument]}')
    if mixers.needs_grid(mixer, **given):
        if patch_drop_rate > 0:
            raise ValueError(
                f'patch_drop_rate = {patch_drop_rate}: this mixer ({mixer!r}) has parameters for each patch, none may '
                'be dropped'
            )
        given.update(grid_size=grid_size, num_prefix_tokens=num_prefix_tokens, prefix_position=prefix_position)
    return partial(mixers.create, mixer, **given)


def resample_mixer_parameter(key: str, value: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """A mixer's parameter from a checkpoint for another number of patches, at the model's; any other as it is.

    The checkpoint's grid is taken to be square. One that cannot be is left alone: loading names the size mismatch.
    """
    path, _, name = key.rpartition('.')
    try:
        mixer = model.get_submodule(path)
    except AttributeError:
        return value
    if not getattr(mixer, 'takes_grid', False) or name not in mixer.grid_parameters():
        return value
    if value.shape == getattr(mixer, name).shape:
        return value
    old = mixer.old_tokens(name, value)
    return value if old is None else mixer.resampled(name, value, old, mixer.tokens)
