"""The recipe as typed data, and how it is read.

A recipe is built from layers of plain nested dictionaries (a file, its base, overrides), merged and then checked as a
whole by `Config.from_dict`, so that a wrong key, type or value ends the run before any work is done.
"""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from hydra_vision.errors import ConfigError, nearest
from hydra_vision.train.contradictions import check_together
from hydra_vision.train.fields import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    DistributedConfig,
    EmaConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
)
from hydra_vision.train.values import check_value, options


@dataclasses.dataclass
class Config:
    """A whole recipe."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    ema: EmaConfig = dataclasses.field(default_factory=EmaConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = 'recipe') -> 'Config':
        """Builds and checks a recipe.

        Args:
            values: nested dictionary, a section a key; what is missing keeps its default.
            source: what error messages call it.

        Raises:
            ConfigError: an unknown key, a wrong type, a value outside its limits, or values that contradict each other.
        """
        checked = check_values(values, source)
        sections = {section.name: section.type(**checked.get(section.name, {})) for section in dataclasses.fields(cls)}
        config = cls(**sections)
        check_together(config, source)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary: tuples become lists, so that YAML and safe unpickling take it."""
        plain = dataclasses.asdict(self)
        for section in plain.values():
            for key, value in section.items():
                if isinstance(value, tuple):
                    section[key] = list(value)
        return plain

    def to_yaml(self, comments: bool = False) -> str:
        """YAML text of every field, with its meaning behind it if `comments`."""
        lines = []
        for name, values in self.to_dict().items():
            lines.append(f'{name}:')
            for field in dataclasses.fields(getattr(self, name)):
                value = yaml.safe_dump([values[field.name]], default_flow_style=True, width=10**6).strip()[1:-1]
                line = f'  {field.name}: {value}'
                lines.append(f'{line:<44}  # {field.metadata["text"]}' if comments else line)
        return '\n'.join(lines) + '\n'

    @property
    def mixes(self) -> bool:
        """Whether training batches are mixed (mixup or CutMix)."""
        return self.augment.mixup > 0 or self.augment.cutmix > 0


def keys() -> Iterator[str]:
    """Every settable key, dotted."""
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(section.type):
            yield f'{section.name}.{field.name}'


def check_keys(values: Any, source: str) -> None:
    """Raises ConfigError for the first key of `values` that no field has, naming the nearest one that exists."""
    if not isinstance(values, Mapping):
        raise ConfigError(f'{source}: expected sections with keys, got {values!r}')
    sections = {section.name: section.type for section in dataclasses.fields(Config)}
    for name, section in values.items():
        if name not in sections:
            raise ConfigError(f'{source}: unknown section {name!r}{nearest(str(name), [*sections, *keys()])}')
        if not isinstance(section, Mapping):
            raise ConfigError(f'{source}: {name} is a section with keys, got {section!r}')
        known = {field.name for field in dataclasses.fields(sections[name])}
        for key in section:
            if key not in known:
                raise ConfigError(f"{source}: unknown key '{name}.{key}'{nearest(f'{name}.{key}', keys())}")


def check_values(values: Mapping[str, Any], source: str) -> dict[str, dict[str, Any]]:
    """The given values as the types of their fields.

    Raises:
        ConfigError: an unknown key, a wrong type or a value outside its limits.
    """
    check_keys(values, source)
    sections = typing.get_type_hints(Config)
    checked: dict[str, dict[str, Any]] = {}
    for name, given in values.items():
        hints = typing.get_type_hints(sections[name])
        limits = {field.name: field.metadata for field in dataclasses.fields(sections[name])}
        checked[name] = {
            key: check_value(value, hints[key], limits[key], f'{name}.{key}', source) for key, value in given.items()
        }
    return checked


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` over `base`, dictionary by dictionary; neither is changed."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def parse_override(text: str, source: str = '--set') -> dict[str, Any]:
    """Reads 'section.key=value' (or 'section.dict_key.name=value') into a nested dictionary.

    The value is read as YAML, except that a text field takes it as it stands.
    """
    key, equals, value = text.partition('=')
    key = key.strip()
    if not equals:
        raise ConfigError(f'{source}: expected KEY=VALUE such as optim.lr=5e-4, got {text!r}')
    path = key.split('.')
    dotted = '.'.join(path[:2])
    if dotted not in set(keys()):
        raise ConfigError(f'{source}: unknown key {key!r}{nearest(key, keys())}')
    hint = typing.get_type_hints(typing.get_type_hints(Config)[path[0]])[path[1]]
    free = typing.get_origin(hint) is dict
    if len(path) > 2 and not free:
        raise ConfigError(f'{source}: {dotted} has no keys of its own, got {key!r}')
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f'{source}: cannot read the value of {key}: {value!r} ({error})') from error
    if str in options(hint) and not (parsed is None and value.strip() and type(None) in options(hint)):
        parsed = value
    for name in reversed(path[1:]):
        parsed = {name: parsed}
    return {path[0]: parsed}
