"""One picture of a run: images/s and memory against the side of the image, one line a model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Optional

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from .models import Result

__all__ = ['plot_results']

_MODE_TITLES = {'infer': 'inference', 'train': 'training (forward + backward)'}
_MARKERS = 'osD^vP*X'
WIDE = 4  # values further apart than this factor get a logarithmic axis


def plot_results(results: Sequence[Result], path: Path, title: str) -> None:
    """Write the picture: a column for each mode; a row for speed and, where it was measured, one for memory."""
    quantities: list[tuple[str, Callable[[Result], Optional[float]]]] = [('images / s', lambda r: r.images_per_second)]
    if any(r.peak_bytes is not None for r in results):
        quantities.append(('peak memory (GiB)', lambda r: None if r.peak_bytes is None else r.peak_bytes / 2**30))
    modes = list(dict.fromkeys(r.case.mode for r in results))
    figure = Figure(figsize=(6.4 * len(modes), 0.6 + 4.2 * len(quantities)), layout='constrained')
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(len(quantities), len(modes), squeeze=False)
    several_executions = len({r.case.compiled for r in results}) > 1
    for row, (name, value) in enumerate(quantities):
        for column, mode in enumerate(modes):
            _draw(axes[row][column], [r for r in results if r.case.mode == mode], value, several_executions)
            axes[row][column].set_title(_MODE_TITLES[mode])
            axes[row][column].set_ylabel(name)
    figure.savefig(path, dpi=120)


def _draw(axis, results: Sequence[Result], value: Callable[[Result], Optional[float]], name_execution: bool) -> None:
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    labels = list(dict.fromkeys(r.case.label for r in results))
    for result in results:
        if value(result) is not None:
            key = (result.case.label, result.case.execution)
            lines.setdefault(key, []).append((result.case.img_size, value(result)))
    for (label, execution), points in lines.items():
        # A model keeps its colour and marker; how it ran shows in the line.
        style = labels.index(label)
        points = sorted(points)
        axis.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=f'C{style % 10}',
            marker=_MARKERS[style % len(_MARKERS)],
            linestyle='--' if name_execution and execution == 'eager' else '-',
            label=f'{label}, {execution}' if name_execution else label,
        )
    axis.set_xscale('log')
    values = [y for points in lines.values() for _, y in points]
    if values and max(values) > WIDE * min(values):
        axis.set_yscale('log')
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # a run may stay inside one decade
        axis.yaxis.set_minor_locator(NullLocator())
    else:  # a few per cent between two lines should look like that
        axis.set_ylim(0, 1.1 * max(values, default=1))
    axis.xaxis.set_major_locator(FixedLocator(sorted({r.case.img_size for r in results})))
    axis.xaxis.set_minor_locator(NullLocator())
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    axis.set_xlabel('side of the image (px)')
    axis.grid(True, alpha=0.3)
    if lines:
        axis.legend()
