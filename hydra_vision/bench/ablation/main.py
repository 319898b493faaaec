"""The command `hydra-vision ablation`: trains a family of mixers under one recipe and prints the paper's tables."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from rich.console import Console

from hydra_vision.bench.ablation.family import Family, FittedRow, fit_rows, read_family
from hydra_vision.bench.ablation.report import COLUMNS, markdown, plot, table_rows
from hydra_vision.bench.ablation.runs import Run, check_folder, rows_of, train, workers_for
from hydra_vision.bench.ablation.speed import MODES, SpeedFile, measure_speed, read_speed
from hydra_vision.bench.report import write_csv
from hydra_vision.bench.turns import failed
from hydra_vision.console import Parser, comma_list, make_table, positive, stdout_console
from hydra_vision.environment import device_name
from hydra_vision.errors import ConfigError, TrainError, UserError
from hydra_vision.io import make_output
from hydra_vision.train.build import amp_dtype, pick_device
from hydra_vision.train.config import Config, merge, parse_override, read_recipe

__all__ = ['main']

TABLES = ['table2', 'table3']
STEPS = ('train', 'speed')


def main(argv: Optional[Sequence[str]] = None, prog: str = 'hydra-vision ablation') -> int:
    """Run the ablation.

    Returns:
        Exit code: 0; 1 where a run or a measurement failed (the others are reported).

    Raises:
        UserError: arguments that do not fit, before anything is trained.
    """
    arguments = _parser(prog).parse_args(argv)
    console = stdout_console()
    names = TABLES if arguments.family == ['all'] else arguments.family
    families = [_chosen(read_family(name), arguments.rows) for name in dict.fromkeys(names)]
    _check_rows(families, arguments.rows)
    families = [family for family in families if family.rows]
    recipe = _recipe(arguments)
    fitted = _fit(families, recipe)
    runs = [_run(row, seed, recipe, arguments.output) for seed in dict.fromkeys(arguments.seeds) for row in fitted]
    console.print(_plan_table(runs))
    if arguments.plan:
        return 0
    for run in runs:
        check_folder(run)
    speed = _speed_file(runs, arguments.output) if 'speed' in arguments.steps else None
    make_output(arguments.output)

    failures = len(train(runs, arguments.jobs, console.print)) if 'train' in arguments.steps else 0
    if speed is not None:
        failures += _measure(runs, *speed, arguments.time_limit, console)
    _report(families, runs, arguments.output, console)
    return 1 if failures else 0


def _chosen(family: Family, rows: Optional[list[str]]) -> Family:
    if rows is None:
        return family
    kept = tuple(row for row in family.rows if row.name in rows)
    return Family(family.name, family.title, family.reference, kept)


def _check_rows(families: list[Family], rows: Optional[list[str]]) -> None:
    known = {row.name for family in families for row in family.rows}
    for name in rows or ():
        if name not in known:
            raise UserError(f'--rows: no row {name!r} in {", ".join(family.name for family in families)}')


def _recipe(arguments: argparse.Namespace) -> dict[str, Any]:
    """Values of the recipe with what the command line changes."""
    try:
        values = read_recipe(arguments.config)
        for text in arguments.overrides:
            values = merge(values, parse_override(text))
        given: dict[str, Any] = {}
        if arguments.data_dir is not None:
            given['data'] = {'dir': str(Path(arguments.data_dir).absolute())}
        if arguments.epochs is not None:
            given['schedule'] = {'epochs': arguments.epochs}
        values = merge(values, given)
        config = Config.from_dict(values, source=arguments.config)
    except TrainError as error:
        raise UserError(str(error)) from error
    for section, key in (('model', 'num_classes'), ('data', 'img_size')):
        if getattr(getattr(config, section), key) is None:
            raise UserError(f'the recipe {arguments.config} must say {section}.{key}: parameters are counted with it')
    if config.data.workers is None:
        values = merge(values, {'data': {'workers': workers_for(arguments.jobs)}})
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
    try:
        return Run(fitted, seed, Config.from_dict(values, source=fitted.row.name), output)
    except ConfigError as error:
        raise UserError(str(error)) from error


def _plan_table(runs: list[Run]):
    lines = []
    for fitted in dict.fromkeys(id(run.fitted) for run in runs):
        own = [run for run in runs if id(run.fitted) == fitted]
        row = own[0].fitted
        kwargs = ', '.join(f'{key}={value}' for key, value in row.model_kwargs.items())
        lines.append([row.row.name, kwargs, f'{row.parameters:,}', ' '.join(str(run.seed) for run in own)])
    return make_table(f'{len(runs)} runs', ['row', 'model arguments', 'parameters', 'seeds'], lines, right=(2,))


def _speed_file(runs: list[Run], output: Path) -> tuple[SpeedFile, torch.device]:
    """The file for the device on which the runs compute, before any work is done."""
    try:
        device = pick_device(runs[0].config)
        amp = amp_dtype(runs[0].config, device)
    except ConfigError as error:
        raise UserError(str(error)) from error
    run = {'device': device_name(device), 'dtype': 'float32' if amp is None else str(amp).removeprefix('torch.')}
    return SpeedFile(output / 'speed.csv', run), device


def _measure(runs: list[Run], file: SpeedFile, device: torch.device, time_limit: float, console: Console) -> int:
    """Measure what is not in the file yet. Returns how many rows failed."""
    first = list({run.fitted.row.name: run for run in reversed(runs)}.values())[::-1]
    failures = 0
    for mode in MODES:
        missing = file.missing(first, mode)
        if len(missing) < len(first):
            console.print(f'{len(first) - len(missing)} of {len(first)} models are measured already, {mode}')
        if not missing:
            continue
        console.print(f'... measuring {len(missing)} models, {mode}')
        speeds = measure_speed(missing, mode, device, rounds=5, time_limit=time_limit)
        file.add(speeds, missing)
        for speed in speeds:
            if failed(speed.status):
                failures += 1
                console.print(f'{speed.row}, {mode}: {speed.status}', soft_wrap=True, markup=False)
    return failures


def _report(families: list[Family], runs: list[Run], output: Path, console: Console) -> None:
    """Tables on the screen and as Markdown, results.csv and the picture."""
    results = rows_of(runs)
    speed = read_speed(output / 'speed.csv')
    text = []
    for family in families:
        lines = table_rows(family, results, speed)
        console.print(make_table(family.title, COLUMNS, lines, right=range(2, len(COLUMNS))))
        text.append(markdown(family.title, lines))
    (output / 'tables.md').write_text('\n'.join(text))
    if results:
        write_csv(output / 'results.csv', results)
        config = runs[0].config
        title = f'{config.model.name}, {config.data.img_size} px, {runs[0].epochs} epochs, equal parameters'
        plot(families, results, output / 'ablation.png', title)
    files = [name for name in ('tables.md', 'results.csv', 'speed.csv', 'ablation.png') if (output / name).is_file()]
    console.print(f'{output}: {", ".join(files)}', soft_wrap=True)


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description="Train a family of mixers under one recipe with equal parameters, and print the paper's tables "
        'for images. The same command continues where it stopped; finished runs and measured speeds are kept.',
    )
    add = parser.add_argument
    add('--config', default='ablation/cifar10', metavar='NAME', help='recipe; default ablation/cifar10')
    add('--data-dir', metavar='PATH', help='folder with train/ and val/, a sub-folder a class')
    add(
        '--family',
        type=comma_list,
        default=['all'],
        metavar='LIST',
        help='table2, table3, a YAML file, or all (the default)',
    )
    add('--rows', type=comma_list, metavar='LIST', help='only these rows')
    add('--seeds', type=int, nargs='+', default=[0], metavar='N', help='default: 0')
    add('--epochs', type=int, metavar='E', help="default: the recipe's")
    add('--jobs', type=positive, default=1, metavar='N', help='runs at a time on the device; default 1')
    add('--output', type=Path, default=Path('output') / 'ablation', metavar='DIR', help='default: output/ablation')
    add('--set', dest='overrides', action='append', default=[], metavar='KEY=VALUE', help='any field of the recipe')
    add('--plan', action='store_true', help='print the runs with their parameters, and stop')
    add(
        '--steps',
        type=_steps,
        default=list(STEPS),
        metavar='LIST',
        help='train, speed or both (the default); speed is measured alone, after training. Tables are always written',
    )
    add('--time-limit', type=float, default=30.0, metavar='S', help='seconds of measuring a mode; default 30')
    return parser


def _steps(text: str) -> list[str]:
    steps = comma_list(text)
    for step in steps:
        if step not in STEPS:
            raise argparse.ArgumentTypeError(f'unknown step {step!r}; allowed: {", ".join(STEPS)}')
    return steps
