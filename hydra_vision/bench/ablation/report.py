"""Tables and picture of an ablation."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hydra_vision.bench.ablation.family import Family, Row

__all__ = ['COLUMNS', 'markdown', 'plot', 'table_rows']

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


def table_rows(
    family: Family, results: Sequence[Mapping[str, Any]], speed: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
    """A line a row of the family, empty where nothing was measured.

    Args:
        family: The table.
        results: Rows of results.csv.
        speed: Rows of speed.csv.
    """
    by_mode = {(line['row'], line['mode']): line for line in speed}
    lines = []
    for row in family.rows:
        runs = [line for line in results if line['row'] == row.name]
        scores = [float(line['top1']) for line in runs]
        train, infer = by_mode.get((row.name, 'train'), {}), by_mode.get((row.name, 'infer'), {})
        lines.append(
            [
                row.label,
                'parameters' if row.data == 'independent' else 'tokens',
                f'{int(runs[0]["parameters"]) / 1e6:.3f}' if runs else '',
                _scores(scores),
                str(len(scores) or ''),
                _rate(train),
                _rate(infer),
                _text(train.get('peak_memory_gib'), '{:.2f}'),
                _text(row.paper, '{:.1f}'),
            ]
        )
    return lines


def _scores(scores: Sequence[float]) -> str:
    """The mean, and how far apart the seeds are."""
    if not scores:
        return 'not finished'
    mean = f'{statistics.fmean(scores):.2f}'
    return mean if len(scores) == 1 else f'{mean} ({min(scores):.2f} to {max(scores):.2f})'


def _rate(line: Mapping[str, Any]) -> str:
    if not line:
        return ''
    return _text(line.get('images_per_s'), '{:.0f}') or str(line.get('status', ''))


def _text(value: Any, form: str) -> str:
    return '' if value in (None, '') else form.format(float(value))


def markdown(title: str, lines: Sequence[Sequence[str]]) -> str:
    """The table as Markdown."""
    table = [COLUMNS, ['---'] * len(COLUMNS), *lines]
    return f'## {title}\n\n' + ''.join(f'| {" | ".join(line)} |\n' for line in table)


def plot(families: Sequence[Family], results: Sequence[Mapping[str, Any]], path: Path, title: str) -> Figure:
    """Top-1 of every row, a panel a table: a point a seed, a line at their mean, colour by where the matrix is from.

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
                text = dict(ha='center', va='center', fontsize=8, style='italic', backgroundcolor='white')
                axes.text(0.5, y, 'not finished', transform=axes.get_yaxis_transform(), **text)
        axes.set_yticks(range(len(family.rows)), [_label(family, row) for row in family.rows])
        axes.set_ylim(len(family.rows) - 0.5, -0.5)
        axes.set(title=family.title, xlabel='validation top-1 (%), last epoch')
        axes.grid(alpha=0.3)
    kinds = (('tab:orange', 'matrix from parameters'), ('tab:blue', 'matrix from the tokens'))
    handles = [Line2D([], [], linestyle='', marker='o', color=color, label=text) for color, text in kinds]
    figure.legend(handles=handles, loc='outside lower center', ncols=2, fontsize=8)  # inside it would hide points
    figure.savefig(path, dpi=120)
    return figure


def _label(family: Family, row: Row) -> Optional[str]:
    twice = [other for other in family.rows if other.label == row.label]
    return row.label if len(twice) == 1 else f'{row.label}, {"fixed" if row.data == "independent" else "from tokens"}'
