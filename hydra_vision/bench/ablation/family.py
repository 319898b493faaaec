"""The rows of an ablation table, and the models that give them equal numbers of parameters."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Optional

import timm
import yaml
from torch import nn

import hydra_vision  # noqa: F401  registers the models
from hydra_vision.errors import UserError
from hydra_vision.train.config import Config, merge, recipe_folder

__all__ = ['Family', 'FittedRow', 'Row', 'fit_rows', 'parameters', 'read_family']

_ADJUSTABLE = ('expand', 'mlp_ratio')


@dataclasses.dataclass(frozen=True)
class Row:
    """One mixer of a table."""

    name: str
    label: str
    mixer: str
    data: Literal['independent', 'dependent'] = 'dependent'
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the mixer
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # other arguments of the model
    adjust: Literal['expand', 'mlp_ratio'] = 'expand'
    step: int = 1  # heads that are added together; 2 where their number must be even
    paper: Optional[float] = None


@dataclasses.dataclass(frozen=True)
class Family:
    """A table: its rows, and the row whose number of parameters all others get."""

    name: str
    title: str
    reference: str
    rows: tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class FittedRow:
    """A row with the arguments that bring it to the reference's number of parameters, and what it then has."""

    row: Row
    model_kwargs: Mapping[str, Any]
    parameters: int


def read_family(name: str) -> Family:
    """The family in ``configs/ablation/NAME.yaml``, or in a file of that path.

    Raises:
        UserError: no such file, an unknown key or value.
    """
    packaged = recipe_folder() / 'ablation' / f'{name}.yaml'
    path = packaged if packaged.is_file() else Path(name)
    if not path.is_file():
        raise UserError(f'--family {name!r}: neither a file nor one of {", ".join(_packaged_families())}')
    try:
        values = yaml.safe_load(path.read_text())
        rows = values.pop('rows')
        common = values.pop('kwargs', {})
        family = Family(path.stem, rows=tuple(_row(key, row, common, path) for key, row in rows.items()), **values)
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f'{path}: not a family of mixers ({error})') from error
    if family.reference not in {row.name for row in family.rows}:
        raise UserError(f'{path}: reference {family.reference!r} is none of its rows')
    return family


def _packaged_families() -> list[str]:
    return sorted(path.stem for path in (recipe_folder() / 'ablation').glob('table*.yaml'))


def _row(name: str, values: Mapping[str, Any], common: Mapping[str, Any], path: Path) -> Row:
    kwargs = {key: value for key, value in {**common, **values.get('kwargs', {})}.items() if value is not None}
    row = Row(name, **{**values, 'kwargs': kwargs})
    if row.data not in ('independent', 'dependent') or row.adjust not in _ADJUSTABLE:
        raise UserError(
            f'{path}, row {name}: data = {row.data!r}, adjust = {row.adjust!r}; allowed: independent or dependent, '
            f'{" or ".join(_ADJUSTABLE)}'
        )
    return row


def parameters(config: Config) -> int:
    """Parameters of a recipe's model, counted without memory for them."""
    # Blocks are alike: two models of few blocks say what a deep one has.
    depth = config.model.kwargs.get('depth') or len(_build(config).blocks)
    one, two = (sum(p.numel() for p in _build(config, depth=n).parameters()) for n in (1, 2))
    return one + (depth - 1) * (two - one)


def _build(config: Config, **kwargs: Any) -> nn.Module:
    model, size = config.model, config.data.img_size
    return timm.create_model(
        model.name,
        num_classes=model.num_classes,
        in_chans=model.in_chans,
        img_size=size if isinstance(size, int) else tuple(size),
        device='meta',
        **{**model.kwargs, **kwargs},
    )


def fit_rows(rows: tuple[Row, ...], reference: Row, recipe: Mapping[str, Any]) -> list[FittedRow]:
    """Bring every row to the number of parameters that the reference has as the recipe stands.

    Args:
        rows: Of one table.
        reference: One of them; it keeps the model's own width.
        recipe: Values of the recipe.

    Raises:
        UserError: a row that the model refuses.
    """
    target = _count(recipe, _model_kwargs(reference, {}), reference)
    return [fit_row(row, target, recipe, own=row == reference) for row in rows]


def fit_row(row: Row, target: int, recipe: Mapping[str, Any], own: bool) -> FittedRow:
    """The value of ``row.adjust`` whose model is nearest to ``target`` parameters.

    Raises:
        UserError: the model refuses the row, or has too many parameters however narrow the row is.
    """
    config = _config(recipe, _model_kwargs(row, {}), row)
    if own:
        return FittedRow(row, _model_kwargs(row, {}), parameters(config))
    step = _steps(config, row)

    @lru_cache
    def count(n: int) -> int:
        return _count(recipe, _model_kwargs(row, {row.adjust: step(n)}), row)

    high = 1
    while count(high) < target:  # the number grows with every step
        high *= 2
    low = max(1, high // 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < target else (low, middle)
    best = min((low, high), key=lambda n: abs(count(n) - target))
    if best == 1 and count(1) > 1.1 * target:
        raise UserError(
            f'row {row.name}: {count(1):,} parameters where it is narrowest, the reference has {target:,}; leave it '
            'out (--rows) or take fewer patches'
        )
    return FittedRow(row, _model_kwargs(row, {row.adjust: step(best)}), count(best))


def _steps(config: Config, row: Row) -> Callable[[int], float]:
    """From a whole number to a value of ``row.adjust`` that the mixer can have."""
    if row.adjust == 'mlp_ratio':
        return lambda n: n / 16
    built = _build(config, depth=1)
    headdim, d_model = getattr(built.blocks[0].mixer, 'headdim', None), built.embed_dim
    if headdim is None:
        raise UserError(f'row {row.name}: the mixer {row.mixer!r} has no headdim; adjust its mlp_ratio')
    return lambda n: n * row.step * headdim / d_model


def _model_kwargs(row: Row, adjusted: Mapping[str, Any]) -> dict[str, Any]:
    mixer_kwargs = dict(row.kwargs)
    kwargs = {'mixer': row.mixer, **row.model}
    for key, value in adjusted.items():
        (mixer_kwargs if key == 'expand' else kwargs)[key] = value
    return {**kwargs, 'mixer_kwargs': mixer_kwargs} if mixer_kwargs else kwargs


def _config(recipe: Mapping[str, Any], model_kwargs: Mapping[str, Any], row: Row) -> Config:
    return Config.from_dict(merge(recipe, {'model': {'kwargs': dict(model_kwargs)}}), source=f'row {row.name}')


def _count(recipe: Mapping[str, Any], model_kwargs: Mapping[str, Any], row: Row) -> int:
    config = _config(recipe, model_kwargs, row)
    try:
        return parameters(config)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(
            f'row {row.name}: cannot build {config.model.name} with {dict(model_kwargs)}: {error}'
        ) from error
