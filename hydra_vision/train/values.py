"""Values of a recipe as the types of their fields."""

import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from hydra_vision.errors import ConfigError


def options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint alone."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)  # `Literal[...] | None` is the latter
    return typing.get_args(hint) if union else (hint,)


def check_value(value: Any, hint: Any, limits: Mapping[str, Any], key: str, source: str) -> Any:
    """`value` as the type that `hint` asks for, inside its limits."""
    for option in options(hint):
        fits, converted = _convert(value, option)
        if fits:
            numbers = converted if isinstance(converted, tuple) else (converted,)
            for number in numbers:
                _check_limits(number, limits, key, source)
            return converted
    raise ConfigError(f'{source}: {key}={value!r} is not valid; allowed: {_describe(hint)}')


def _convert(value: Any, option: Any) -> tuple[bool, Any]:
    """Whether `value` is of type `option`, and the value as that type."""
    origin = typing.get_origin(option)
    if origin is Literal:
        return value in typing.get_args(option), value
    if origin is dict:
        return isinstance(value, Mapping) and all(isinstance(name, str) for name in value), value
    if origin is tuple:
        element, *rest = typing.get_args(option)
        if not isinstance(value, (list, tuple)) or (rest != [Ellipsis] and len(value) != 1 + len(rest)):
            return False, value
        items = [_convert(item, element) for item in value]
        return bool(items) and all(fits for fits, _ in items), tuple(item for _, item in items)
    if option is float:
        if isinstance(value, str):  # YAML reads 1e-3 as text: it wants 1.0e-3
            try:
                return True, float(value)
            except ValueError:
                return False, value
        return isinstance(value, (int, float)) and not isinstance(value, bool), value
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    return isinstance(value, option), value


def _check_limits(number: Any, limits: Mapping[str, Any], key: str, source: str) -> None:
    """Raises ConfigError where a number is outside the limits of its field, or not finite."""
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return
    low, high, above = limits['low'], limits['high'], limits['above']
    allowed = []
    allowed += [f'>= {low}'] if low is not None else []
    allowed += [f'> {above}'] if above is not None else []
    allowed += [f'<= {high}'] if high is not None else []
    inside = (low is None or number >= low) and (above is None or number > above) and (high is None or number <= high)
    if not inside or number in (float('inf'), float('-inf')) or number != number:
        raise ConfigError(
            f'{source}: {key}={number} is not valid; allowed: {" and ".join(allowed) or "finite numbers"}'
        )


def _describe(hint: Any) -> str:
    """A type hint in words."""
    words = []
    for option in options(hint):
        origin = typing.get_origin(option)
        if option is type(None):
            words.append('null')
        elif origin is Literal:
            words += [str(choice) for choice in typing.get_args(option)]
        elif origin is dict:
            words.append('a mapping')
        elif origin is tuple:
            element, *rest = typing.get_args(option)
            count = 'a list' if rest == [Ellipsis] else f'{1 + len(rest)}'
            words.append(f'{count} of {element.__name__}' if rest == [Ellipsis] else f'[{count} x {element.__name__}]')
        else:
            words.append({int: 'a whole number', float: 'a number', bool: 'true or false', str: 'text'}[option])
    return ', '.join(words[:-1]) + ' or ' + words[-1] if len(words) > 1 else words[0]
