"""The rows of an ablation table, and the models that give them equal numbers of parameters."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import timm
import yaml
from torch import nn

import hydra_vision  # noqa: F401  registers the models
from hydra_vision.errors import UserError
from hydra_vision.train.config import Config, merge

FOLDER = Path(__file__).parent
ADJUSTABLE = ('expand', 'mlp_ratio')


@dataclasses.dataclass(frozen=True)
class Row:
    """One mixer of a table.

    Attributes:
        name: Of the row, and of its runs.
        label: In tables and pictures.
        mixer: Registered name, or a list of names that repeats over the blocks.
        data: Whether the matrix comes from parameters ('independent') or from the tokens.
        kwargs: Of the mixer.
        model: Other arguments of the model.
        adjust: What brings the model to the reference's number of parameters.
        step: Heads that are added together; 2 where their number must be even.
        paper: The paper's result.
    """

    name: str
    label: str
    mixer: str | Sequence[str]
    data: Literal['independent', 'dependent'] = 'dependent'
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    adjust: Literal['expand', 'mlp_ratio'] = 'expand'
    step: int = 1
    paper: float | None = None

    def model_kwargs(self, **adjusted: float) -> dict[str, Any]:
        """Arguments of the model, ``expand`` or ``mlp_ratio`` among them."""
        mixer_kwargs = {**self.kwargs, **{key: value for key, value in adjusted.items() if key == 'expand'}}
        kwargs = {'mixer': self.mixer, **self.model, **{k: v for k, v in adjusted.items() if k != 'expand'}}
        return {**kwargs, 'mixer_kwargs': mixer_kwargs} if mixer_kwargs else kwargs


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
    """The family in ``NAME.yaml`` of this folder, or in a file of that path.

    Raises:
        UserError: No such file, an unknown key or value.
    """
    packaged = FOLDER / f'{name}.yaml'
    path = packaged if packaged.is_file() else Path(name)
    if not path.is_file():
        names = ', '.join(sorted(path.stem for path in FOLDER.glob('table*.yaml')))
        raise UserError(f'--family {name!r}: neither a file nor one of {names}')
    try:
        values = yaml.safe_load(path.read_text(encoding='utf-8'))
        rows = values.pop('rows')
        common = values.pop('kwargs', {})
        family = Family(path.stem, rows=tuple(_row(key, row, common, path) for key, row in rows.items()), **values)
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f'{path}: not a family of mixers ({error})') from error
    if family.reference not in {row.name for row in family.rows}:
        raise UserError(f'{path}: reference {family.reference!r} is none of its rows')
    return family


def _row(name: str, values: Mapping[str, Any], common: Mapping[str, Any], path: Path) -> Row:
    kwargs = {key: value for key, value in {**common, **values.get('kwargs', {})}.items() if value is not None}
    row = Row(name, **{**values, 'kwargs': kwargs})
    if row.data not in ('independent', 'dependent') or row.adjust not in ADJUSTABLE:
        raise UserError(
            f'{path}, row {name}: data={row.data!r}, adjust={row.adjust!r}; allowed: independent or dependent, '
            f'{" or ".join(ADJUSTABLE)}'
        )
    return row


def fit_rows(rows: tuple[Row, ...], reference: Row, recipe: Mapping[str, Any]) -> list[FittedRow]:
    """Bring every row to the number of parameters that the reference has as the recipe stands.

    Args:
        rows: Of one table.
        reference: One of them; it keeps the model's own width.
        recipe: Values of the recipe.

    Raises:
        UserError: A row that the model rejects, or that has too many parameters however narrow it is.
    """
    own = FittedRow(reference, reference.model_kwargs(), _count(recipe, reference.model_kwargs(), reference))
    return [own if row == reference else _fit_row(row, own.parameters, recipe) for row in rows]


def _fit_row(row: Row, target: int, recipe: Mapping[str, Any]) -> FittedRow:
    """The value of ``row.adjust`` whose model is nearest to ``target`` parameters, by bisection."""
    width = _widths(_config(recipe, row.model_kwargs(), row), row)

    @lru_cache
    def count(n: int) -> int:
        return _count(recipe, row.model_kwargs(**{row.adjust: width(n)}), row)

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
    return FittedRow(row, row.model_kwargs(**{row.adjust: width(best)}), count(best))


def _widths(config: Config, row: Row) -> Callable[[int], float]:
    """From a whole number to a value of ``row.adjust`` that the mixer can have."""
    if row.adjust == 'mlp_ratio':
        return lambda n: n / 16
    built = _build(config, row)
    headdim, d_model = getattr(built.blocks[0].mixer, 'headdim', None), built.embed_dim
    if headdim is None:
        raise UserError(f'row {row.name}: the mixer {row.mixer!r} has no headdim; adjust its mlp_ratio')
    return lambda n: n * row.step * headdim / d_model


def _count(recipe: Mapping[str, Any], model_kwargs: Mapping[str, Any], row: Row) -> int:
    """Parameters of the model, counted without memory for them."""
    return sum(p.numel() for p in _build(_config(recipe, model_kwargs, row), row).parameters())


def _build(config: Config, row: Row) -> nn.Module:
    model, size = config.model, config.data.img_size
    try:
        return timm.create_model(
            model.name,
            num_classes=model.num_classes,
            in_chans=model.in_chans,
            img_size=size if isinstance(size, int) else tuple(size),
            device='meta',
            **model.kwargs,
        )
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f'row {row.name}: cannot build {model.name} with {dict(model.kwargs)}: {error}') from error


def _config(recipe: Mapping[str, Any], model_kwargs: Mapping[str, Any], row: Row) -> Config:
    return Config.from_dict(merge(recipe, {'model': {'kwargs': dict(model_kwargs)}}), source=f'row {row.name}')
