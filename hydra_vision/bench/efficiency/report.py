"""Crossings as table and CSV, curves as a picture."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from hydra_vision.bench.efficiency.crossing import find_crossing, fit_power_law, fitted_crossing
from hydra_vision.bench.efficiency.points import ATTENTIONS, PASSES, Point
from hydra_vision.bench.turns import failed

__all__ = ['COLUMNS', 'crossing_rows', 'curves', 'plot_points', 'table_lines']

Curve = dict[int, Optional[float]]
COLUMNS = ['mixer', 'passes', 'time growth', *(f'time: {name}' for name in ATTENTIONS)]
COLUMNS += ['memory growth', *(f'memory: {name}' for name in ATTENTIONS)]

_QUANTITIES: dict[str, Callable[[Point], Optional[float]]] = {
    'time': lambda point: point.seconds_per_token,
    'memory': lambda point: None if point.peak_bytes is None else float(point.peak_bytes),
}


def curves(points: Sequence[Point], mode: str, quantity: str) -> dict[str, Curve]:
    """Mixer -> length -> cost: seconds a token, or peak bytes of a call. Empty for what was not measured at all.

    Out of memory is None; where a mixer failed, nothing is known.
    """
    value = _QUANTITIES[quantity]
    if all(value(point) is None for point in points):  # memory on the CPU
        return {}
    found: dict[str, Curve] = {}
    for point in points:
        if point.mode == mode and not failed(point.status):
            found.setdefault(point.mixer, {})[point.length] = value(point)
    return found


def crossing_rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """One row of crossings.csv for every mixer, pass, quantity and attention."""
    rows = []
    for mode in dict.fromkeys(point.mode for point in points):
        for quantity in _QUANTITIES:
            found = curves(points, mode, quantity)
            for name, curve in found.items():
                for attention in ATTENTIONS:
                    if name in ATTENTIONS or attention not in found:
                        continue
                    own, other = fit_power_law(curve), fit_power_law(found[attention])
                    crossing = find_crossing(curve, found[attention])
                    fitted = fitted_crossing(own, other, max(curve))
                    rows.append(
                        {
                            'mixer': name,
                            'against': attention,
                            'passes': PASSES[mode],
                            'quantity': quantity,
                            'measured': crossing.kind,
                            'measured_length': None if crossing.length is None else round(crossing.length, 1),
                            'fitted_length': None if fitted is None else round(fitted, 1),
                            'exponent': None if own is None else round(own.exponent, 3),
                            'attention_exponent': None if other is None else round(other.exponent, 3),
                        }
                    )
    return rows


def table_lines(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A line a mixer and pass: growth of the cost with L, and the crossing with each attention."""
    lines = []
    for mixer, passes in dict.fromkeys((row['mixer'], row['passes']) for row in rows):
        line = [mixer, passes]
        for quantity in _QUANTITIES:
            own = [r for r in rows if (r['mixer'], r['passes'], r['quantity']) == (mixer, passes, quantity)]
            exponent = own[0]['exponent'] if own else None
            line.append('' if exponent is None else f'L^{exponent:.2f}')
            for attention in ATTENTIONS:
                line.append(next((_crossing_text(row) for row in own if row['against'] == attention), ''))
        lines.append(line)
    return lines


def _crossing_text(row: Mapping[str, Any]) -> str:
    if row['measured'] == 'at':
        return f'{row["measured_length"]:.0f}'
    if row['measured'] == 'none in range' and row['fitted_length'] is not None:
        return f'none in range (fit: {row["fitted_length"]:.0f})'
    return row['measured']


def plot_points(points: Sequence[Point], path: Path, title: str) -> None:
    """A column a pass; time a token, and peak memory where it was measured. Attention is black."""
    points = [point for point in points if not failed(point.status)]
    if not points:
        return
    modes = list(dict.fromkeys(point.mode for point in points))
    quantities = [quantity for quantity in _QUANTITIES if curves(points, modes[0], quantity)] or ['time']
    figure = Figure(figsize=(7.2 * len(modes) + 2.6, 0.6 + 4.6 * len(quantities)), layout='constrained')
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(len(quantities), len(modes), squeeze=False)
    names = [name for name in dict.fromkeys(point.mixer for point in points) if name not in ATTENTIONS]
    lengths = sorted({point.length for point in points})
    for row, quantity in enumerate(quantities):
        for column, mode in enumerate(modes):
            panel = axes[row][column]
            for name, curve in curves(points, mode, quantity).items():
                x = [n for n in sorted(curve) if curve[n] is not None]
                scale = 1e9 if quantity == 'time' else 2**-30
                style = _style(name, names)
                panel.plot(x, [curve[n] * scale for n in x], label=name, markersize=4, **style)
            panel.set_xscale('log', base=2)
            panel.set_yscale('log')
            panel.xaxis.set_major_locator(FixedLocator(lengths))
            panel.xaxis.set_minor_locator(NullLocator())
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
            panel.set(
                title=PASSES[mode],
                xlabel='tokens of a sequence, L',
                ylabel='time (ns a token)' if quantity == 'time' else 'peak memory of a call (GiB)',
            )
            panel.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside right upper', fontsize=8)
    figure.savefig(path, dpi=120)


def _style(name: str, names: Sequence[str]) -> dict[str, Any]:
    if name in ATTENTIONS:
        return {'color': 'black', 'linewidth': 2.5, 'linestyle': '-' if name == ATTENTIONS[0] else '--', 'marker': 's'}
    fixed = name.endswith(', fixed')
    family = list(dict.fromkeys(n.removesuffix(', fixed') for n in names))
    color = colormaps['tab20'](family.index(name.removesuffix(', fixed')) % 20)
    return {'color': color, 'linestyle': ':' if fixed else '-', 'marker': 'o', 'linewidth': 2 if name == 'hydra' else 1}
