"""From a model's arguments to its mixers, and from a checkpoint's mixers to the model's."""

import inspect
from functools import partial
from typing import Any, Callable, Dict, Optional, Tuple, Union

import torch
import torch.nn as nn

from .. import mixers

__all__ = ['mixer_factory', 'resample_mixer_parameter']


def mixer_factory(
    mixer: str,
    options: Dict[str, Any],
    mixer_kwargs: Optional[Dict[str, Any]],
    mixer_params: Optional[Union[int, str]],
    *,
    model: Callable,
    d_model: int,
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
        mixer_params: How many parameters the mixer shall have, see `mixers.match_parameters`; or the mixer that has as
            many with these options.
        model: The model's class, whose signature says what the defaults of `options` are.
        grid_size: Patches that the model is made for.
        num_prefix_tokens: Class tokens.
        prefix_position: Where they stand.
        patch_drop_rate: Of the model.
        d_model: Width of the model.

    Raises:
        ValueError: An unknown mixer; an option with another value than its default that the mixer does not have, or
            that is in `mixer_kwargs` as well; dropped patches with a mixer that has parameters for each patch.
        TypeError: A key of `mixer_kwargs` that the mixer does not take.
    """
    given = dict(mixer_kwargs or {})
    for argument in ('grid_size', 'num_prefix_tokens', 'prefix_position'):
        if argument in given:
            raise ValueError(f'mixer_kwargs: {argument} = {given[argument]}; the model knows its tokens, leave it away')
    defaults = inspect.signature(model).parameters
    changed = {
        option
        for option, value in options.items()
        if value != (tuple(defaults[option].default) if isinstance(value, tuple) else defaults[option].default)
    }
    options = {'bias' if option == 'mixer_bias' else option: (option, value) for option, value in options.items()}
    allowed = mixers.arguments(mixer)
    reference = mixers.arguments(mixer_params) if isinstance(mixer_params, str) else ()
    for argument, (option, value) in options.items():
        if argument not in allowed:
            if option in changed and argument not in reference:
                raise ValueError(
                    f'{option} = {value}: the mixer {mixer!r} has no {argument}; it takes: {", ".join(sorted(allowed))}'
                )
        elif argument not in given:
            given[argument] = value
        elif option in changed and given[argument] != value:
            raise ValueError(f'{option} = {value}, but mixer_kwargs has {argument} = {given[argument]}')
    tokens = dict(grid_size=grid_size, num_prefix_tokens=num_prefix_tokens, prefix_position=prefix_position)
    if mixers.needs_grid(mixer, **given):
        if patch_drop_rate > 0:
            raise ValueError(
                f'patch_drop_rate = {patch_drop_rate}: this mixer ({mixer!r}) has parameters for each patch, none may '
                'be dropped'
            )
        given.update(tokens)
    if mixer_params is not None:
        if isinstance(mixer_params, str):
            like = {argument: value for argument, (_, value) in options.items() if argument in reference}
            if mixers.needs_grid(mixer_params):
                like.update(tokens)
            mixer_params = mixers.count_parameters(mixer_params, d_model, **like)
        given.update(mixers.match_parameters(mixer, d_model, mixer_params, **given))
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
