"""Train a family of mixers under one recipe with equal parameters, and print the paper's tables for images.

The same command continues where it stopped; finished runs and measured speeds are kept.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console

import hydra_vision.bench as bench
from hydra_vision.console import Parser, comma_list, make_table, markdown_table, path, positive, stdout_console
from hydra_vision.device import amp_dtype, available_cores, pick_device
from hydra_vision.environment import device_name
from hydra_vision.errors import UserError
from hydra_vision.io import make_output, read_csv, write_csv, write_text
from hydra_vision.sdpa import attention_that_ran
from hydra_vision.timing import Step, measure
from hydra_vision.train.build import create_model
from hydra_vision.train.config import Config, merge, parse_override, read_recipe

from .. import run as run_command
from ..record import Record, failed, number
from .rows import FOLDER, Family, FittedRow, Row, fit_rows, read_family
from .runs import Run, one_line, train

TABLES = ['table2', 'table3']
STEPS = ('train', 'speed')
SPEED_ROUNDS = 5
COLUMNS = [
    'mixer',
    'matrix from',
    'parameters (M)',
    'top-1 %',
    'seeds',
    'train images/s',
    'infer images/s',
    'train GiB',
    'GLUE (paper)',
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ablation.

    Returns:
        Exit code: 0; 1 where a run or a measurement failed (the others are reported).

    Raises:
        UserError: Arguments that do not fit, before anything is trained.
    """
    arguments = _parser().parse_args(argv)
    console = stdout_console()
    names = dict.fromkeys(TABLES if arguments.family == ['all'] else arguments.family)
    families = _families(list(names), arguments.rows)
    recipe = _recipe(arguments)
    runs = [
        _run(fitted, seed, recipe, arguments.output)
        for seed in dict.fromkeys(arguments.seeds)
        for fitted in _fit(families, recipe)
    ]
    console.print(_plan_table(runs))
    if arguments.plan:
        return 0
    for run in runs:
        run.check_folder()
    speed = Speed(runs, arguments.output) if 'speed' in arguments.steps else None
    make_output(arguments.output)
    failures = len(train(runs, arguments.jobs, console.print)) if 'train' in arguments.steps else 0
    if speed is not None:
        failures += speed.measure(arguments.time_limit, console)
    _report(families, runs, arguments.output, console)
    return 1 if failures else 0


# What is run


def _families(names: list[str], rows: list[str] | None) -> list[Family]:
    """The families with the chosen rows; those without one are left out."""
    families = [read_family(name) for name in names]
    known = {row.name for family in families for row in family.rows}
    for name in rows or ():
        if name not in known:
            raise UserError(f'--rows: no row {name!r} in {", ".join(names)}')
    kept = [
        Family(f.name, f.title, f.reference, tuple(row for row in f.rows if rows is None or row.name in rows))
        for f in families
    ]
    return [family for family in kept if family.rows]


def _recipe(arguments: argparse.Namespace) -> dict[str, Any]:
    """Values of the recipe with what the command line changes."""
    own = FOLDER / f'{arguments.config}.yaml'
    values = read_recipe(str(own) if own.is_file() else arguments.config)
    for text in arguments.overrides:
        values = merge(values, parse_override(text))
    if arguments.data_dir is not None:
        values = merge(values, {'data': {'dir': str(arguments.data_dir.absolute())}})
    if arguments.epochs is not None:
        values = merge(values, {'schedule': {'epochs': arguments.epochs}})
    config = Config.from_dict(values, source=arguments.config)
    for section, key in (('model', 'num_classes'), ('data', 'img_size')):
        if getattr(getattr(config, section), key) is None:
            raise UserError(f'the recipe {arguments.config} must say {section}.{key}: parameters are counted with it')
    if config.data.workers is None:  # the share of the cores, next to one for each run itself
        values = merge(values, {'data': {'workers': max(1, available_cores() // arguments.jobs - 1)}})
    return values


def _fit(families: list[Family], recipe: dict[str, Any]) -> list[FittedRow]:
    """Every row once, at the parameters of its family's reference."""
    fitted: dict[str, FittedRow] = {}
    for family in families:
        reference = next(row for row in read_family(family.name).rows if row.name == family.reference)
        for row in fit_rows(family.rows, reference, recipe):
            if fitted.setdefault(row.row.name, row).model_kwargs != row.model_kwargs:
                raise UserError(f'row {row.row.name} means different models in different tables; give it two names')
    return list(fitted.values())


def _run(fitted: FittedRow, seed: int, recipe: dict[str, Any], output: Path) -> Run:
    values = merge(recipe, {'model': {'kwargs': dict(fitted.model_kwargs)}, 'run': {'seed': seed}})
    return Run(fitted, seed, Config.from_dict(values, source=fitted.row.name), output)


def _by_row(runs: Sequence[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.fitted.row.name, []).append(run)
    return found


def _plan_table(runs: list[Run]):
    lines = []
    for name, own in _by_row(runs).items():
        kwargs = ', '.join(f'{key}={value}' for key, value in own[0].fitted.model_kwargs.items())
        lines.append([name, kwargs, f'{own[0].fitted.parameters:,}', ' '.join(str(run.seed) for run in own)])
    return make_table(f'{len(runs)} runs', ['row', 'model arguments', 'parameters', 'seeds'], lines, right=(2,))


# Images/s and memory, one process, nothing else on the device


class Speed:
    """speed.csv: images/s of every row's model in eager mode, kept for rows and modes that another call measured.

    Args:
        runs: Of the ablation; of those of a row, the first counts.
        output: Folder of the ablation.

    Raises:
        UserError: No such device, or speed.csv holds times of another device or precision; it is not changed.
    """

    def __init__(self, runs: Sequence[Run], output: Path) -> None:
        self.runs = {name: own[0] for name, own in _by_row(runs).items()}
        config = runs[0].config
        self.device = pick_device(config.run.device)
        self.dtype = amp_dtype(config.run.amp, self.device)
        dtype = 'float32' if self.dtype is None else str(self.dtype).removeprefix('torch.')
        self.settings = {'device': device_name(self.device), 'dtype': dtype}
        self.record = Record(output / 'speed.csv', ('row', 'mode'), self.settings)

    def measure(self, time_limit: float, console: Console) -> int:
        """Measure what is not there yet, or was measured of another model or failed. Returns how many rows failed."""
        failures = 0
        for mode in bench.MODES:
            missing = [name for name in self.runs if not self._has(name, mode)]
            if len(missing) < len(self.runs):
                console.print(
                    f'{len(self.runs) - len(missing)} of {len(self.runs)} models are measured already, {mode}'
                )
            if not missing:
                continue
            console.print(f'... measuring {len(missing)} models, {mode}')
            ran: dict[str, str] = {}
            steps = {name: partial(self._build, name, mode, ran) for name in missing}
            for name, measured in measure(steps, self.device, rounds=SPEED_ROUNDS, time_limit=time_limit).items():
                columns = measured.columns()
                if measured.timing is None:
                    columns['peak_memory_gib'] = None
                batch = self.runs[name].config.data.batch_size
                rate = None if measured.median is None else round(batch / measured.median, 1)
                where = {
                    'row': name,
                    'mode': mode,
                    **self._model(name),
                    **self.settings,
                    'attention': ran.get(name, ''),
                }
                self.record.add([{**where, 'images_per_s': rate, **columns}])
                if measured.failed:
                    failures += 1
                    console.print(f'{name}, {mode}: {measured.status}', soft_wrap=True)
        return failures

    def _has(self, name: str, mode: str) -> bool:
        row = self.record.get(name, mode)
        same = row is not None and all(str(row.get(key)) == str(value) for key, value in self._model(name).items())
        return same and not failed(row)

    def _model(self, name: str) -> dict[str, Any]:
        """What a row of speed.csv is about."""
        config, fitted = self.runs[name].config, self.runs[name].fitted
        size = config.data.img_size
        return {
            'batch': config.data.batch_size,
            'img_size': size if isinstance(size, int) else 'x'.join(map(str, size)),
            'parameters': fitted.parameters,
            'model': one_line({'name': config.model.name, **config.model.kwargs}),
        }

    def _build(self, name: str, mode: str, ran: dict[str, str]) -> Step:
        config = self.runs[name].config
        model = create_model(config, config.model.num_classes).to(self.device)
        size, batch = config.data.img_size, config.data.batch_size
        sides = (size, size) if isinstance(size, int) else size
        images = torch.randn(batch, config.model.in_chans, *sides, device=self.device)
        target = torch.randint(config.model.num_classes, (batch,), device=self.device)
        step = bench.model_step(model, model, images, target, mode, self.dtype)
        ran[name] = attention_that_ran(step, self.device, model)
        return step


# Tables and picture


def _report(families: list[Family], runs: list[Run], output: Path, console: Console) -> None:
    """Tables on the screen and as Markdown, results.csv and the picture."""
    results = [row for row in (run.row() for run in runs) if row is not None]
    speed = read_csv(output / 'speed.csv') if (output / 'speed.csv').is_file() else []
    text = []
    for family in families:
        lines = table_rows(family, results, speed)
        console.print(make_table(family.title, COLUMNS, lines, right=range(2, len(COLUMNS))))
        text.append(f'## {family.title}\n\n{markdown_table(COLUMNS, lines)}')
    write_text(output / 'tables.md', '\n'.join(text))
    if results:
        write_csv(output / 'results.csv', results)
        config = runs[0].config
        title = f'{config.model.name}, {config.data.img_size} px, {runs[0].epochs} epochs, equal parameters'
        plot(families, results, output / 'ablation.png', title)
    files = [name for name in ('tables.md', 'results.csv', 'speed.csv', 'ablation.png') if (output / name).is_file()]
    console.print(f'{output}: {", ".join(files)}', soft_wrap=True)


def table_rows(
    family: Family, results: Sequence[Mapping[str, Any]], speed: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
    """A line per row of the family, empty where nothing was measured.

    Args:
        family: The table.
        results: Rows of results.csv.
        speed: Rows of speed.csv.
    """
    by_mode = {(line['row'], line['mode']): line for line in speed}
    lines = []
    for row in family.rows:
        runs = [line for line in results if line['row'] == row.name]
        train, infer = by_mode.get((row.name, 'train'), {}), by_mode.get((row.name, 'infer'), {})
        lines.append(
            [
                row.label,
                'parameters' if row.data == 'independent' else 'tokens',
                f'{int(runs[0]["parameters"]) / 1e6:.3f}' if runs else '',
                _scores([float(line['top1']) for line in runs]),
                str(len(runs) or ''),
                _text(number(train, 'images_per_s'), '.0f') or train.get('status', ''),
                _text(number(infer, 'images_per_s'), '.0f') or infer.get('status', ''),
                _text(number(train, 'peak_memory_gib'), '.2f'),
                _text(row.paper, '.1f'),
            ]
        )
    return lines


def _scores(scores: Sequence[float]) -> str:
    """The mean, and how far apart the seeds are."""
    if not scores:
        return 'not finished'
    mean = f'{statistics.fmean(scores):.2f}'
    return mean if len(scores) == 1 else f'{mean} ({min(scores):.2f} to {max(scores):.2f})'


def _text(value: float | None, form: str) -> str:
    return '' if value is None else format(value, form)


def plot(families: Sequence[Family], results: Sequence[Mapping[str, Any]], file: Path, title: str) -> Figure:
    """Top-1 of every row, a panel per table: a point per seed, a line at their mean, colour by the matrix's source.

    A row without a finished run says so.
    """
    tallest = max(len(family.rows) for family in families)
    figure = Figure(figsize=(6.8 * len(families), 1.4 + 0.34 * tallest), layout='constrained')
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    for axes, family in zip(figure.subplots(1, len(families), squeeze=False)[0], families):
        for y, row in enumerate(family.rows):
            scores = [float(line['top1']) for line in results if line['row'] == row.name]
            color = 'tab:orange' if row.data == 'independent' else 'tab:blue'
            if scores:
                axes.plot(scores, [y] * len(scores), 'o', color=color, alpha=0.8)
                axes.plot([statistics.fmean(scores)], [y], '|', color=color, markersize=16)
            else:
                style = {'ha': 'center', 'va': 'center', 'fontsize': 8, 'style': 'italic', 'backgroundcolor': 'white'}
                axes.text(0.5, y, 'not finished', transform=axes.get_yaxis_transform(), **style)
        axes.set_yticks(range(len(family.rows)), [_label(family, row) for row in family.rows])
        axes.set_ylim(len(family.rows) - 0.5, -0.5)
        axes.set(title=family.title, xlabel='validation top-1 (%), last epoch')
        axes.grid(alpha=0.3)
    kinds = (('tab:orange', 'matrix from parameters'), ('tab:blue', 'matrix from the tokens'))
    handles = [Line2D([], [], linestyle='', marker='o', color=color, label=text) for color, text in kinds]
    figure.legend(handles=handles, loc='outside lower center', ncols=2, fontsize=8)  # inside it would hide points
    figure.savefig(file, dpi=120)
    return figure


def _label(family: Family, row: Row) -> str:
    twice = [other for other in family.rows if other.label == row.label]
    return row.label if len(twice) == 1 else f'{row.label}, {"fixed" if row.data == "independent" else "from tokens"}'


# The command


def _parser() -> Parser:
    parser = Parser(
        prog='python -m benchmarks.ablation',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        example='python -m benchmarks.ablation --data-dir cifar10 --family table3 --seeds 0 1 --jobs 4',
    )
    add = parser.add_argument
    add('--config', default='cifar10', metavar='NAME', help='recipe: cifar10 (default), imagenette128, or any other')
    add('--data-dir', type=path, metavar='PATH', help='folder with train/ and val/, a sub-folder per class')
    add('--family', type=comma_list, default=['all'], metavar='LIST', help='table2, table3, a YAML file; default: all')
    add('--rows', type=comma_list, metavar='LIST', help='only these rows')
    add('--seeds', type=int, nargs='+', default=[0], metavar='N', help='default: 0')
    add('--epochs', type=positive, metavar='E', help="default: the recipe's")
    add('--jobs', type=positive, default=1, metavar='N', help='runs at a time on the device; default 1')
    add('--output', type=path, default=Path('output') / 'ablation', metavar='FOLDER', help='default: output/ablation')
    add('--set', dest='overrides', action='append', default=[], metavar='KEY=VALUE', help='any field of the recipe')
    add('--plan', action='store_true', help='print the runs with their parameters, and stop')
    add(
        '--steps',
        type=bench.choices(STEPS),
        default=list(STEPS),
        metavar='LIST',
        help='train, speed or both (the default); speed is measured alone, after training. Tables are always written',
    )
    add('--time-limit', type=float, default=30.0, metavar='S', help='seconds of measuring per mode; default 30')
    return parser


if __name__ == '__main__':
    run_command(main, 'ablation')
