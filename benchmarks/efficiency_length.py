"""Efficiency length: from how many tokens on a mixer costs less than attention, in time and in memory.

Measured against unfused attention and against scaled_dot_product_attention, in blocks of the same width. With the same
--output the same command continues where it stopped.

The measure is that of the Comprehensive Attention Benchmark (Zhang et al., ICML 2023, https://arxiv.org/abs/2210.07661).
Its published script reads the clock without waiting for the device and never resets the peak memory between two points;
here each point is synchronised and starts from a fresh peak (hydra_vision/timing.py). --protocol cab is theirs in all
other respects (benchmarks/cab.py) and prints the nine published lengths beneath.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from torch import Tensor, nn

import hydra_vision.bench as bench
from hydra_vision import mixers
from hydra_vision.console import Parser, make_table, positive, positive_list, stdout_console
from hydra_vision.environment import device_name, versions
from hydra_vision.errors import UserError, nearest
from hydra_vision.io import write_csv
from hydra_vision.sdpa import ATTENTION, attention_backend, attention_that_ran
from hydra_vision.timing import MIN_ROUNDS, Step, measure

from . import cab, run
from .record import Record, failed, number

UNFUSED, FUSED = 'attention, unfused', 'attention, SDPA'
ATTENTIONS = (UNFUSED, FUSED)  # timm's block, as in a ViT of the same width
PASSES = {'infer': 'forward', 'train': 'forward+backward'}
QUANTITIES = {'time': 'ns_per_token', 'memory': 'peak_memory_gib'}  # of a call with a fixed number of tokens
FITTED_POINTS = 4  # the longest ones: below, constant costs hide the growth
_REACH = 16  # a fit says nothing about lengths many times longer than the longest one measured
_BURST = 0.02  # seconds
_DEFAULTS = {
    'cuda': {'lengths': [2**n for n in range(6, 15)], 'tokens': 16384, 'd_model': 384},
    'cpu': {'lengths': [64, 128, 256, 512], 'tokens': 512, 'd_model': 64},
}

Row = Mapping[str, Any]  # of points.csv
Curve = dict[int, float | None]  # length -> cost; None where it ran out of memory


# What is timed


def variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every mixer of the family by the name in tables: its registered name and arguments."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in mixers.list_mixers():
        if name == 'vit_attention':  # it is what the others are compared with
            continue
        found['attention, family' if name == 'attention' else name] = (name, {})
        if 'data_dependent' in mixers.arguments(name):
            found[f'{name}, fixed'] = (name, {'data_dependent': False})
    return found


def grid_of(length: int) -> tuple[int, int]:
    """Rows and columns, as near to each other as the divisors of ``length`` allow."""
    rows = max(n for n in range(1, math.isqrt(length) + 1) if length % n == 0)
    return rows, length // rows


def make_mixer(variant: str, d_model: int, length: int, device: torch.device) -> nn.Module:
    """A mixer of ``variants`` or one of ``ATTENTIONS`` for so many tokens."""
    if variant in ATTENTIONS:
        mixer = mixers.create('vit_attention', d_model, device=device)
        mixer.fused_attn = variant == FUSED
        return mixer
    name, kwargs = variants()[variant]
    if mixers.needs_grid(name, **kwargs):
        kwargs = {**kwargs, 'grid_size': grid_of(length)}
    return mixers.create(name, d_model, device=device, **kwargs)


def build_step(mixer: nn.Module, u: Tensor, mode: str, dtype: torch.dtype | None, attention: str = 'auto') -> Step:
    """Forward without gradients, or forward and backward to tokens and parameters."""

    def forward() -> Tensor:
        autocast = torch.autocast(u.device.type, dtype=dtype, enabled=dtype is not None)
        with autocast, attention_backend(attention):
            return mixer(u)

    def infer() -> Tensor:
        with torch.no_grad():
            return forward()

    if mode == 'infer':
        return infer
    inputs, gradient = [u, *mixer.parameters()], torch.randn_like(infer())
    return lambda: torch.autograd.grad(forward(), inputs, gradient)


def measure_length(
    names: Sequence[str],
    length: int,
    mode: str,
    device: torch.device,
    *,
    tokens: int,
    d_model: int,
    dtype: torch.dtype | None,
    rounds: int,
    time_limit: float = math.inf,
    attention: str = 'auto',
) -> list[dict[str, Any]]:
    """Rows of points.csv, without the settings: the mixers at one length, in interleaved rounds.

    Args:
        names: Of ``variants`` and ``ATTENTIONS``.
        length: Tokens of a sequence.
        mode: 'infer' or 'train'.
        device: Where to run.
        tokens: Of a call, over all its sequences; one sequence at least.
        d_model: Width.
        dtype: Of autocast, None without; weights are float32.
        rounds: Most rounds.
        time_limit: Seconds after which no further round starts.
        attention: Backend of scaled_dot_product_attention.
    """
    batch = max(1, tokens // length)
    u = torch.randn(batch, length, d_model, device=device, requires_grad=mode == 'train')
    ran: dict[str, str] = {}

    def build(name: str) -> Step:
        step = build_step(make_mixer(name, d_model, length, device), u, mode, dtype, attention)
        if name == FUSED:
            ran[name] = attention_that_ran(step, device) or 'math'
        return step

    limit = {'rounds': rounds, 'time_limit': time_limit, 'burst': _BURST}
    rows = []
    for name, measured in measure({name: partial(build, name) for name in names}, device, **limit).items():
        columns = measured.columns()
        if measured.timing is None:
            columns['peak_memory_gib'] = None
        per_token = None if measured.median is None else round(measured.median * 1e9 / (batch * length), 4)
        where = {'mixer': name, 'L': length, 'batch': batch, 'passes': PASSES[mode], 'attention': ran.get(name, '')}
        rows.append({**where, **columns, 'ns_per_token': per_token})
    return rows


# Crossings


@dataclass(frozen=True)
class Crossing:
    """From where on a mixer costs less than attention.

    Attributes:
        kind: 'always': at every length; 'at': from ``length`` on; 'none in range': not at the longest one;
            'not measured': no length at which both have a result.
        length: Tokens, for 'at'.
    """

    kind: Literal['always', 'at', 'none in range', 'not measured']
    length: float | None = None


@dataclass(frozen=True)
class Fit:
    """cost = factor * L ** exponent, by least squares on logarithms."""

    factor: float
    exponent: float


def find_crossing(mixer: Curve, attention: Curve) -> Crossing:
    """The measured crossing: the mixer is cheaper there and at every longer length that was measured.

    Between the last length at which attention is cheaper and the next one, both curves are straight lines on
    logarithmic axes. Running out of memory costs more than any result; a length that is missing was not measured.
    """
    lengths = sorted(n for n in mixer.keys() & attention.keys() if mixer[n] is not None or attention[n] is not None)
    if not lengths:
        return Crossing('not measured')

    def gap(n: int) -> float:
        ours, theirs = mixer[n], attention[n]
        if ours is None:
            return math.inf
        return -math.inf if theirs is None else math.log(ours) - math.log(theirs)

    dearer = [n for n in lengths if gap(n) > 0]
    if not dearer:
        return Crossing('always')
    if dearer[-1] == lengths[-1]:
        return Crossing('none in range')
    below, above = dearer[-1], lengths[lengths.index(dearer[-1]) + 1]
    if math.isinf(gap(below)) or math.isinf(gap(above)):
        return Crossing('at', float(above))
    share = gap(below) / (gap(below) - gap(above))
    return Crossing('at', math.exp(math.log(below) + share * (math.log(above) - math.log(below))))


def fit_power_law(costs: Curve) -> Fit | None:
    """The power law through the longest ``FITTED_POINTS`` lengths with a result; None with fewer than two."""
    points = [(math.log(n), math.log(cost)) for n, cost in sorted(costs.items()) if cost is not None][-FITTED_POINTS:]
    if len(points) < 2:
        return None
    exponent, intercept = statistics.linear_regression(*zip(*points))
    return Fit(math.exp(intercept), exponent)


def fitted_crossing(mixer: Fit | None, attention: Fit | None, longest: int) -> float | None:
    """Where the fitted laws meet, up to 16 times the longest length measured.

    None where they do not, or where the mixer does not grow slower than attention.
    """
    if mixer is None or attention is None or mixer.exponent >= attention.exponent:
        return None
    where = (math.log(mixer.factor) - math.log(attention.factor)) / (attention.exponent - mixer.exponent)
    return math.exp(where) if where <= math.log(_REACH * longest) else None


def curves(points: Sequence[Row], passes: str, quantity: str) -> dict[str, Curve]:
    """Mixer -> length -> cost. Empty for what was not measured at all: memory on the CPU.

    Out of memory is None; where a mixer failed, nothing is known.
    """
    column = QUANTITIES[quantity]
    if all(number(point, column) is None for point in points):
        return {}
    found: dict[str, Curve] = {}
    for point in points:
        if point['passes'] == passes and not failed(point):
            found.setdefault(point['mixer'], {})[int(point['L'])] = number(point, column)
    return found


def crossing_rows(points: Sequence[Row]) -> list[dict[str, Any]]:
    """One row of crossings.csv per mixer, pass, quantity and attention."""
    rows = []
    for passes in dict.fromkeys(point['passes'] for point in points):
        for quantity in QUANTITIES:
            found = curves(points, passes, quantity)
            for name in (n for n in found if n not in ATTENTIONS):
                for attention in (a for a in ATTENTIONS if a in found):
                    own, other = fit_power_law(found[name]), fit_power_law(found[attention])
                    crossing = find_crossing(found[name], found[attention])
                    fitted = fitted_crossing(own, other, max(found[name]))
                    rows.append(
                        {
                            'mixer': name,
                            'against': attention,
                            'passes': passes,
                            'quantity': quantity,
                            'measured': crossing.kind,
                            'measured_length': None if crossing.length is None else round(crossing.length, 1),
                            'fitted_length': None if fitted is None else round(fitted, 1),
                            'exponent': None if own is None else round(own.exponent, 3),
                            'attention_exponent': None if other is None else round(other.exponent, 3),
                        }
                    )
    return rows


# What a run leaves behind

COLUMNS = ['mixer', 'passes']
for _quantity in QUANTITIES:
    COLUMNS += [f'{_quantity} growth', *(f'{_quantity}: {name}' for name in ATTENTIONS)]


def table_lines(rows: Sequence[Row]) -> list[list[str]]:
    """A line per mixer and pass: growth of the cost with L, and the crossing with each attention."""
    lines = []
    for mixer, passes in dict.fromkeys((row['mixer'], row['passes']) for row in rows):
        line = [mixer, passes]
        for quantity in QUANTITIES:
            own = [r for r in rows if (r['mixer'], r['passes'], r['quantity']) == (mixer, passes, quantity)]
            exponent = own[0]['exponent'] if own else None
            line.append('' if exponent is None else f'L^{exponent:.2f}')
            for attention in ATTENTIONS:
                line.append(next((_crossing_text(row) for row in own if row['against'] == attention), ''))
        lines.append(line)
    return lines


def _crossing_text(row: Row) -> str:
    if row['measured'] == 'at':
        return f'{row["measured_length"]:.0f}'
    if row['measured'] == 'none in range' and row['fitted_length'] is not None:
        return f'none in range (fit: {row["fitted_length"]:.0f})'
    return row['measured']


def plot_points(points: Sequence[Row], path: Path, title: str) -> None:
    """A column per pass; time per token, and peak memory where it was measured. Attention is black."""
    points = [point for point in points if not failed(point)]
    if not points:
        return
    passes = list(dict.fromkeys(point['passes'] for point in points))
    labels = {'time': 'time (ns per token)', 'memory': 'peak memory of a call (GiB)'}
    quantities = [quantity for quantity in QUANTITIES if curves(points, passes[0], quantity)] or ['time']
    figure = Figure(figsize=(7.2 * len(passes) + 2.6, 0.6 + 4.6 * len(quantities)), layout='constrained')
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(len(quantities), len(passes), squeeze=False)
    names = [name for name in dict.fromkeys(point['mixer'] for point in points) if name not in ATTENTIONS]
    for row, quantity in zip(axes, quantities):
        for panel, one in zip(row, passes):
            for name, curve in curves(points, one, quantity).items():
                x = [n for n in sorted(curve) if curve[n] is not None]
                panel.plot(x, [curve[n] for n in x], label=name, markersize=4, **_style(name, names))
            panel.set_xscale('log', base=2)
            panel.set_yscale('log')
            panel.xaxis.set_major_locator(FixedLocator(sorted({int(point['L']) for point in points})))
            panel.xaxis.set_minor_locator(NullLocator())
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
            panel.set(title=one, xlabel='tokens of a sequence, L', ylabel=labels[quantity])
            panel.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc='outside right upper', fontsize=8)
    figure.savefig(path, dpi=120)


def _style(name: str, names: Sequence[str]) -> dict[str, Any]:
    if name in ATTENTIONS:
        return {'color': 'black', 'linewidth': 2.5, 'linestyle': '-' if name == UNFUSED else '--', 'marker': 's'}
    family = list(dict.fromkeys(n.removesuffix(', fixed') for n in names))
    color = colormaps['tab20'](family.index(name.removesuffix(', fixed')) % 20)
    line = ':' if name.endswith(', fixed') else '-'
    return {'color': color, 'linestyle': line, 'marker': 'o', 'linewidth': 2 if name == 'hydra' else 1}


# The command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement.

    Returns:
        Exit code: 0; 1 where a mixer failed (the others are measured and reported).

    Raises:
        UserError: Arguments that do not fit, before any work is done.
    """
    arguments = _parser().parse_args(argv)
    device, dtype = bench.timing_device(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.protocol == 'cab':
        return _cab(arguments, device)
    defaults = _DEFAULTS[device.type]
    lengths = sorted(set(arguments.lengths or defaults['lengths']))
    tokens, d_model = arguments.tokens or max(defaults['tokens'], lengths[-1]), arguments.d_model or defaults['d_model']
    if tokens < lengths[-1]:
        raise UserError(f'--tokens {tokens}: a call holds a whole sequence, and the longest has {lengths[-1]} tokens')
    names = [*ATTENTIONS, *_names(arguments.mixers)]
    for name in names:
        try:
            make_mixer(name, d_model, lengths[0], torch.device('meta'))
        except (TypeError, ValueError) as error:
            raise UserError(f'{name} cannot be built with --d-model {d_model}: {error}') from error
    stamp = time.strftime('%Y%m%d-%H%M%S')
    output = arguments.output or Path('output') / f'efficiency-length-{device.type}-{stamp}'
    shared = {
        'device': device_name(device),
        'dtype': 'float32' if dtype is None else str(dtype).removeprefix('torch.'),
        'd_model': d_model,
        'threads': torch.get_num_threads(),
    }
    measured_with = {'tokens': tokens, 'rounds': arguments.rounds, 'attention': arguments.attention}
    settings = {**shared, **measured_with, 'mixers': sorted(names), 'versions': versions()}
    record = Record(output / 'points.csv', ('passes', 'L', 'mixer'), settings, arguments.overwrite)

    console = stdout_console()
    groups = [(mode, length) for mode in arguments.mode for length in lengths]
    todo = to_do(record, groups, names)
    if len(todo) < len(groups):
        console.print(f'{len(groups) - len(todo)} of {len(groups)} lengths and passes are measured already')
    console.print(
        f'every length is written to {output} when it is measured; --output {output} continues', soft_wrap=True
    )
    options = {'tokens': tokens, 'd_model': d_model, 'dtype': dtype, 'attention': arguments.attention}
    options |= {'rounds': arguments.rounds, 'time_limit': arguments.time_limit}
    for mode, length in todo:
        console.print(f'... L = {length}, {max(1, tokens // length)} sequences, {PASSES[mode]}, {len(names)} mixers')
        rows = measure_length(names, length, mode, device, **options)
        record.add([{**row, **shared} for row in rows])
        for row in filter(failed, rows):
            console.print(f'{row["mixer"]}: {row["status"]}', soft_wrap=True)
    points = sorted(record.rows, key=lambda row: (row['passes'], int(row['L'])))
    rows = crossing_rows(points)
    if rows:
        write_csv(output / 'crossings.csv', rows)
    where = f'{shared["device"]}, {shared["dtype"]}, width {d_model}, {tokens} tokens per call'
    plot_points(points, output / 'efficiency_length.png', where)
    title = f'efficiency length: from how many tokens on a mixer costs less than attention ({where})'
    console.print(make_table(title, COLUMNS, table_lines(rows), right=range(2, len(COLUMNS))))
    ran = ', '.join(sorted({point['attention'] for point in points if point.get('attention')}))
    console.print(
        'growth: of the time per token, or of the memory of a call with a fixed number of tokens, fitted to the '
        "longest lengths; 'always': cheaper at every length measured; attention: timm's block of the same width; "
        f'SDPA ran: {ran}'
    )
    console.print(f'wrote {output}: ' + ', '.join(sorted(path.name for path in output.iterdir())), soft_wrap=True)
    failures = sum(map(failed, points))
    if failures:
        console.print(f'{failures} of {len(points)} points failed, see points.csv; the same command tries them again')
    return 1 if failures else 0


def _cab(arguments: argparse.Namespace, device: torch.device) -> int:
    """``main`` under CAB's protocol."""
    given = {'--tokens': arguments.tokens, '--d-model': arguments.d_model}
    given['--mode'] = None if arguments.mode == list(PASSES) else ','.join(arguments.mode)
    given['--attention'] = None if arguments.attention == 'auto' else arguments.attention
    given['--amp'] = None if arguments.amp in ('auto', 'none') else arguments.amp
    for option, value in given.items():
        if value is not None:
            raise UserError(
                f'{option} {value}: --protocol cab fixes it; only --mixers, --lengths and --rounds are free'
            )
    names = [UNFUSED, *_names(arguments.mixers)]
    lengths = sorted(set(arguments.lengths or cab.LENGTHS))
    calls = cab.CALLS if arguments.rounds == MIN_ROUNDS else arguments.rounds
    stamp = time.strftime('%Y%m%d-%H%M%S')
    output = arguments.output or Path('output') / f'efficiency-length-cab-{device.type}-{stamp}'
    columns = {'device': device_name(device), 'threads': torch.get_num_threads()}
    settings = {**columns, 'protocol': 'cab', 'calls': calls, 'versions': versions()}
    record = Record(output / 'points.csv', ('L', 'mixer'), settings, arguments.overwrite)
    console = stdout_console()
    build = partial(_build_cab, device)
    cab.measure(record, names, lengths, device, calls, build, columns)
    for row in filter(failed, record.rows):
        console.print(f'{row["mixer"]}, L = {row["L"]}: {row["status"]}', soft_wrap=True)
    title = (
        f"efficiency length by CAB's protocol, synchronised and with a fresh peak ({columns['device']}, float32, width "
        f'{cab.WIDTH}, batch {cab.BATCH}, forward in train mode, {calls} calls; against {UNFUSED})'
    )
    lines = cab.table_lines(record.rows, names[1:], UNFUSED)
    console.print(make_table(title, ['mixer', 'measured', 'time', 'memory'], lines, right=range(2, 4)))
    console.print(f'wrote {output}', soft_wrap=True)
    return 1 if any(map(failed, record.rows)) else 0


def _build_cab(device: torch.device, name: str, length: int) -> nn.Module:
    return make_mixer(name, cab.WIDTH, length, device)


def to_do(record: Record, groups: Sequence[tuple[str, int]], names: Sequence[str]) -> list[tuple[str, int]]:
    """Groups (mode, length) that are not measured, then those in which something failed."""
    new, again = [], []
    for mode, length in groups:
        found = [record.get(PASSES[mode], length, name) for name in names]
        if None in found:
            new.append((mode, length))
        elif any(map(failed, found)):
            again.append((mode, length))
    return new + again


def _names(given: list[str] | None) -> list[str]:
    known = variants()
    for name in given or ():
        if name not in known:
            raise UserError(f'--mixers: unknown {name!r}{nearest(name, known)}; known: {"; ".join(known)}')
    return list(dict.fromkeys(given)) if given else list(known)


def _parser() -> Parser:
    parser = Parser(
        prog='python -m benchmarks.efficiency_length',
        description=__doc__,
        epilog="Mixers whose name ends in ', fixed' have a matrix that does not depend on the image.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        example="python -m benchmarks.efficiency_length --mixers 'hydra; low_rank' --lengths 64,128 --output lengths",
    )
    add = parser.add_argument
    split: Callable[[str], list[str]] = lambda text: [part.strip() for part in text.split(';')]  # noqa: E731
    add('--mixers', type=split, metavar='LIST', help="separated by ';'; default: the whole family")
    add('--lengths', type=positive_list, metavar='LIST', help='default: 64 to 16384 on CUDA, 64 to 512 on the CPU')
    add(
        '--tokens',
        type=positive,
        metavar='N',
        help='of a call, over all its sequences; default 16384 (CPU: 512), the longest length if that is more',
    )
    add('--d-model', type=positive, metavar='N', help='width; default 384 (CPU: 64)')
    add('--mode', type=bench.choices(PASSES), default=list(PASSES), metavar='LIST', help='infer,train (both)')
    add(
        '--protocol',
        choices=('ours', 'cab'),
        default='ours',
        help="cab: the benchmark's own, next to what it published",
    )
    add('--attention', choices=ATTENTION, default='auto', help="of SDPA; auto: PyTorch's choice")
    bench.add_timing_arguments(parser, rounds=MIN_ROUNDS, time_limit=math.inf)
    return parser


if __name__ == '__main__':
    run(main, 'efficiency_length')
