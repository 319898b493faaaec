"""Finished runs: `hydra-vision runs compare`, `runs average`, `runs export`.

Every command is a pair of functions: one that adds its arguments to a parser, one that runs it.
"""

import argparse
import csv
import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from ..console import make_table, markdown_table, path, stdout_console
from ..errors import CheckpointError, UserError
from ..io import make_output, write_atomically, write_csv, write_text
from . import build, data
from .checkpoint import BEST, find_checkpoint, load_run, load_weights, write_checkpoint
from .config import Config
from .report import RUN, duration

_COLUMNS = (
    *('run', 'model', 'seed', 'params (M)', 'epochs', 'top-1 % (last)', 'top-1 % (best)'),
    *('images/s', 'data wait %', 'peak GiB', 'training time'),
)
_MEANS = ('model', 'runs', 'top-1 % (last): mean (range)', 'images/s')


# compare


@dataclasses.dataclass
class Run:
    """Content of a run folder.

    Attributes:
        name: Name of the folder.
        config: Its recipe.
        facts: Its run.json.
        rows: Its summary.csv, one row per epoch, numbers where there are numbers.
    """

    name: str
    config: dict[str, Any]
    facts: dict[str, Any]
    rows: list[dict[str, float]]

    @property
    def group(self) -> str:
        """Runs of one group differ in the seed only."""
        model, data = self.config['model'], self.config['data']
        rest = {key: value for key, value in self.config.items() if key != 'run'}
        rest['run'] = {key: value for key, value in self.config['run'].items() if key != 'seed'}
        key = json.dumps(rest, sort_keys=True)
        return f'{model["name"]} | {data["dir"] or data["name"]} | {key}'

    def scores(self) -> list[tuple[float, float]]:
        """Epoch and top-1 of the raw weights, where it was validated."""
        return [(row['epoch'], row['val_top1']) for row in self.rows if 'val_top1' in row]

    def speed(self) -> float:
        """Median images per second of an epoch, without the first one, which warms up, where there are more."""
        values = [row['images_per_second'] for row in self.rows]
        return statistics.median(values[1:] or values)

    def cells(self) -> list[str]:
        """Its row of the table."""
        scores = [score for _, score in self.scores()]
        seconds = sum(row['seconds'] for row in self.rows)
        waited = sum(row['seconds'] * row.get('data_wait', 0.0) for row in self.rows) / max(seconds, 1e-9)
        memory = [row['peak_memory_gib'] for row in self.rows if 'peak_memory_gib' in row]
        return [
            *(self.name, self.config['model']['name'], str(self.config['run']['seed'])),
            *(f'{self.facts["parameters"] / 1e6:.2f}', str(int(self.rows[-1]['epoch']))),
            *(f'{scores[-1]:.2f}' if scores else '', f'{max(scores):.2f}' if scores else ''),
            *(f'{self.speed():.0f}', f'{100 * waited:.0f}', f'{max(memory):.2f}' if memory else '', duration(seconds)),
        ]


def read_run(folder: Path) -> Run:
    """Read config.yaml, run.json and summary.csv of a run folder.

    Raises:
        UserError: No such folder, or one of the files is missing, empty or damaged.
    """
    if not folder.is_dir():
        raise UserError(f'{folder} is not a folder')
    try:
        config = yaml.safe_load((folder / 'config.yaml').read_text())
        facts = json.loads((folder / RUN).read_text())
        with open(folder / 'summary.csv', newline='') as file:
            rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
        run = Run(folder.name, config, facts, rows)
        if not rows:
            raise UserError(f'{folder}: no epoch was finished')
        run.cells()
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        what = (
            f'{error.strerror}: {error.filename}' if isinstance(error, OSError) else f'{type(error).__name__} {error}'
        )
        raise UserError(f'{folder} is not a readable run folder ({what})') from error
    return run


def groups_of(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs grouped by everything except the seed, in the order of their first run."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.group, []).append(run)
    return found


def summary_rows(runs: Sequence[Run]) -> list[list[str]]:
    """One row per group of more than one seed: mean and range of the last top-1, mean speed."""
    rows = []
    for group in groups_of(runs).values():
        scores = [run.scores()[-1][1] for run in group if run.scores()]
        if len(group) < 2 or not scores:
            continue
        spread = f'{statistics.mean(scores):.2f} ({min(scores):.2f} to {max(scores):.2f})'
        speed = f'{statistics.mean(run.speed() for run in group):.0f}'
        rows.append([group[0].config['model']['name'], ', '.join(run.name for run in group), spread, speed])
    return rows


def draw(runs: Sequence[Run], file: Path) -> None:
    """Validation accuracy and training loss over epochs, one color per group, one line per run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 4.4), dpi=120, layout='constrained')
    scores, losses = figure.subplots(1, 2)
    for index, group in enumerate(groups_of(runs).values()):
        for number, run in enumerate(group):
            style = {'color': f'C{index % 10}', 'linestyle': ('-', '--', ':', '-.')[number % 4], 'label': run.name}
            points = run.scores()
            if points:
                scores.plot(*zip(*points, strict=True), **style)
            losses.plot([r['epoch'] for r in run.rows], [r['train_loss'] for r in run.rows], **style)
    scores.set(title='Validation accuracy, raw weights', xlabel='epoch', ylabel='accuracy (%)')
    losses.set(title='Training loss', xlabel='epoch', ylabel='cross-entropy')
    for axes in (scores, losses):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    losses.legend(fontsize='small')
    write_atomically(file, lambda opened: FigureCanvasAgg(figure).print_png(opened))


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `runs compare`."""
    parser.add_argument('runs', nargs='+', type=path, metavar='RUN', help='run folders')
    parser.add_argument('--output', type=path, metavar='DIR', help='also write compare.png, compare.csv and compare.md')


def compare_main(arguments: argparse.Namespace) -> int:
    """Print finished runs next to each other, and draw their curves.

    Args:
        arguments: Of `add_compare_arguments`.

    Returns:
        Exit code.
    """
    runs = [read_run(folder) for folder in arguments.runs]
    rows, means = [run.cells() for run in runs], summary_rows(runs)
    console = stdout_console()
    console.print(make_table('runs', _COLUMNS, rows, right=range(2, len(_COLUMNS))))
    if means:
        console.print(make_table('by model', _MEANS, means, right=(2, 3)))
    if arguments.output is not None:
        folder = make_output(arguments.output)
        tables = markdown_table(_COLUMNS, rows) + ('\n' + markdown_table(_MEANS, means) if means else '')
        write_text(folder / 'compare.md', tables)
        write_csv(folder / 'compare.csv', [dict(zip(_COLUMNS, row, strict=True)) for row in rows], _COLUMNS)
        draw(runs, folder / 'compare.png')
        console.print(f'{folder}: compare.png, compare.csv, compare.md')
    return 0


# average


def average(states: Sequence[Mapping[str, torch.Tensor]], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The mean of state dicts, computed in float64; integers (counters) are those of the last one.

    Args:
        states: Of the same model.
        names: Their names in error messages.

    Raises:
        CheckpointError: Names or shapes that differ.
    """
    first = states[0]
    for name, state in zip(names[1:], states[1:]):
        if state.keys() != first.keys():
            other = sorted(state.keys() ^ first.keys())
            raise CheckpointError(f'{names[0]} and {name} are of different models: only one of them has {other[0]}')
        for key, value in state.items():
            if value.shape != first[key].shape:
                shapes = f'{tuple(first[key].shape)} and {tuple(value.shape)}'
                raise CheckpointError(f'{names[0]} and {name} are of different models: {key} has the shapes {shapes}')
    mean = {}
    for key, value in first.items():
        if not value.is_floating_point():
            mean[key] = states[-1][key].clone()
            continue
        total = torch.zeros(value.shape, dtype=torch.float64)
        for state in states:
            total += state[key]
        mean[key] = (total / len(states)).to(value.dtype)
    return mean


def pick_weights(state: Mapping[str, Any], weights: str, name: str) -> dict[str, torch.Tensor]:
    """The raw or the averaged (EMA) weights of a checkpoint; 'auto': those that validated best so far, else raw ones.

    Raises:
        CheckpointError: Averaged weights are asked for, and there are none.
    """
    if weights == 'auto':
        best = state.get('best')
        weights = 'ema' if best and best['weights'] == 'EMA' and state['state_dict_ema'] is not None else 'raw'
    key = {'raw': 'state_dict', 'ema': 'state_dict_ema'}[weights]
    if state[key] is None:
        raise CheckpointError(f'{name} has no averaged (EMA) weights: --weights raw')
    return state[key]


def add_average_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `runs average`."""
    parser.add_argument('checkpoints', nargs='+', metavar='CHECKPOINT', help='two or more files, or run folders (best)')
    parser.add_argument('--output', required=True, type=path, metavar='FILE', help='new checkpoint, e.g. averaged.pt')
    parser.add_argument('--weights', choices=('raw', 'ema', 'auto'), default='raw', help='which weights of each')


def average_main(arguments: argparse.Namespace) -> int:
    """Average the weights of several checkpoints into one that can be validated.

    Args:
        arguments: Of `add_average_arguments`.

    Returns:
        Exit code.
    """
    if len(arguments.checkpoints) < 2:
        raise UserError('give two checkpoints or more')
    if arguments.output.exists():
        raise UserError(f'--output {arguments.output} exists already; it is not overwritten')
    if not arguments.output.parent.is_dir():
        raise UserError(f'--output {arguments.output}: {arguments.output.parent} is not a folder')
    names = [str(find_checkpoint(text, BEST)) for text in arguments.checkpoints]
    states = [load_run(Path(name)) for name in names]
    picked = [pick_weights(state, arguments.weights, name) for state, name in zip(states, names)]
    keys = ('arch', 'config', 'num_classes', 'classes', 'epoch', 'history', 'versions')
    # `updates` and the optimizer are left out on purpose: there is no run that could be resumed.
    merged = {key: states[-1][key] for key in keys if key in states[-1]}
    merged |= {'best': None, 'state_dict': average(picked, names), 'state_dict_ema': None, 'averaged': names}
    write_checkpoint(arguments.output, merged)
    print(f'{arguments.output}: mean of {len(names)} checkpoints ({arguments.weights} weights)')
    if any(key.endswith('running_mean') for key in merged['state_dict']):
        print('note: the statistics of batch norms were averaged as well; those of the averaged weights may differ')
    return 0


# export


def trained_model(state: Mapping[str, Any], weights: str, name: str) -> tuple[nn.Module, Config]:
    """The model of a checkpoint, on the CPU, and its recipe.

    Args:
        state: Of `load_checkpoint`.
        weights: 'raw', 'ema' or 'auto', see `pick_weights`.
        name: Name of the checkpoint in error messages.

    Raises:
        CheckpointError: Weights that are not there or do not fit.
    """
    config = Config.from_dict(state['config'], source=name)
    model = build.create_model(config, state['num_classes'], load_weights=False)
    load_weights(model, pick_weights(state, weights, name), config.model.name)
    return model.eval(), config


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `runs export`."""
    parser.add_argument('run', metavar='RUN|CHECKPOINT', help='run folder (its best checkpoint), or a checkpoint')
    parser.add_argument('--output', required=True, type=path, metavar='DIR', help='new folder')
    parser.add_argument('--weights', choices=('auto', 'raw', 'ema'), default='auto', help='auto: those that are best')
    parser.add_argument(
        '--dtype', choices=('float32', 'float16', 'bfloat16'), default='float32', help='precision of the file'
    )


def export_main(arguments: argparse.Namespace) -> int:
    """Write a run as config.json and model.safetensors, which timm.create_model('local-dir:DIR') opens.

    Args:
        arguments: Of `add_export_arguments`.

    Returns:
        Exit code.
    """
    folder = arguments.output
    taken = [name for name in ('config.json', 'model.safetensors') if (folder / name).exists()]
    if taken:
        raise UserError(f'--output {folder} holds {" and ".join(taken)} already; nothing is overwritten')
    from ..hub import save_pretrained

    checkpoint = find_checkpoint(arguments.run, BEST)
    state = load_run(checkpoint)
    model, config = trained_model(state, arguments.weights, str(checkpoint))
    inputs = data.resolve_input(config, model)
    keys = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
    preprocessing = {key: inputs[key] for key in keys if inputs.get(key) is not None}
    own = {key: value for key, value in config.model.kwargs.items() if not key.startswith('pretrained_')}
    model.to(getattr(torch, arguments.dtype))
    try:
        save_pretrained(model, folder, model_args=own, label_names=state['classes'], data_config=preprocessing)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    print(f'{folder}: config.json, model.safetensors ({config.model.name}, epoch {state["epoch"]})')
    print(f"open it with timm.create_model('local-dir:{folder}', pretrained=True) after import hydra_vision")
    return 0
