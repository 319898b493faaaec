"""Finished runs side by side: `hydra-vision compare-runs RUN...` prints a table and draws the curves."""

import argparse
import csv
import dataclasses
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hydra_vision.console import Parser
from hydra_vision.errors import UserError
from hydra_vision.io import make_output, write_atomically, write_text
from hydra_vision.train.provenance import RUN
from hydra_vision.train.report import duration, markdown_table

_COLUMNS = (
    *('run', 'model', 'seed', 'params (M)', 'epochs', 'top-1 % (last)', 'top-1 % (best)'),
    *('images/s', 'data wait %', 'peak GiB', 'training time'),
)


@dataclasses.dataclass
class Run:
    """What a run folder tells.

    Attributes:
        name: the folder's name.
        config: its recipe.
        facts: its run.json.
        rows: its summary.csv, an epoch a row, numbers where there are numbers.
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
        """Median images a second of an epoch, the first one left out where there are more: it warms up."""
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
    """Reads config.yaml, run.json and summary.csv of a run folder.

    Raises:
        UserError: no such folder, or one of the files is missing, empty or damaged.
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
    """Runs by what they share beside the seed, in the order of their first run."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.group, []).append(run)
    return found


def summary_rows(runs: Sequence[Run]) -> list[list[str]]:
    """A row for every group of more than one seed: mean and range of the last top-1, mean speed."""
    rows = []
    for group in groups_of(runs).values():
        scores = [run.scores()[-1][1] for run in group if run.scores()]
        if len(group) < 2 or not scores:
            continue
        spread = f'{statistics.mean(scores):.2f} ({min(scores):.2f} to {max(scores):.2f})'
        speed = f'{statistics.mean(run.speed() for run in group):.0f}'
        rows.append([group[0].config['model']['name'], ', '.join(run.name for run in group), spread, speed])
    return rows


def draw(runs: Sequence[Run], path: Path) -> None:
    """Validation accuracy and training loss over epochs, a colour a group, a line a run."""
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
    scores.set(title='Validation accuracy, raw weights', xlabel='epoch', ylabel='images right (%)')
    losses.set(title='Training loss', xlabel='epoch', ylabel='cross-entropy')
    for axes in (scores, losses):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    losses.legend(fontsize='small')
    write_atomically(path, lambda file: FigureCanvasAgg(figure).print_png(file))


def main(argv: Sequence[str], prog: str) -> int:
    """Runs the command."""
    parser = Parser(prog=prog, description='Put finished runs side by side: a table and a picture of their curves.')
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='run folders')
    parser.add_argument('--output', type=Path, metavar='DIR', help='also write compare.png, compare.csv and compare.md')
    arguments: argparse.Namespace = parser.parse_args(argv)
    from hydra_vision.console import make_table, stdout_console

    runs = [read_run(folder) for folder in arguments.runs]
    rows, means = [run.cells() for run in runs], summary_rows(runs)
    header = ['model', 'runs', 'top-1 % (last): mean (range)', 'images/s']
    console = stdout_console()
    console.print(make_table('runs', _COLUMNS, rows, right=range(2, len(_COLUMNS))))
    if means:
        console.print(make_table('by model', header, means, right=(2, 3)))
    if arguments.output is not None:
        make_output(arguments.output)
        tables = markdown_table(_COLUMNS, rows) + ('\n' + markdown_table(header, means) if means else '')
        write_text(arguments.output / 'compare.md', tables)
        text = io.StringIO()
        csv.writer(text, lineterminator='\n').writerows([_COLUMNS, *rows])
        write_text(arguments.output / 'compare.csv', text.getvalue())
        draw(runs, arguments.output / 'compare.png')
        console.print(f'{arguments.output}: compare.png, compare.csv, compare.md')
    return 0
