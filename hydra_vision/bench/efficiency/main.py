"""The command `hydra-vision efficiency-length`: time and memory of every mixer against attention over L."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import torch

from hydra_vision.bench.arguments import DTYPES, choose_device
from hydra_vision.bench.efficiency.points import ATTENTIONS, PASSES, make_mixer, measure_length, variants
from hydra_vision.bench.efficiency.record import Record
from hydra_vision.bench.efficiency.report import COLUMNS, crossing_rows, plot_points, table_lines
from hydra_vision.bench.report import write_csv
from hydra_vision.bench.timing import MIN_ROUNDS, rounds
from hydra_vision.bench.turns import failed
from hydra_vision.console import Parser, comma_list, make_table, positive, positive_list, stdout_console
from hydra_vision.environment import device_name, versions
from hydra_vision.errors import UserError, nearest

__all__ = ['main']

_DEFAULTS = {
    'cuda': {'lengths': [2**n for n in range(6, 15)], 'tokens': 16384, 'd_model': 384, 'dtype': 'bfloat16'},
    'cpu': {'lengths': [64, 128, 256, 512], 'tokens': 512, 'd_model': 64, 'dtype': 'float32'},
}
_BURST = 0.02  # seconds


def main(argv: Optional[Sequence[str]] = None, prog: str = 'hydra-vision efficiency-length') -> int:
    """Run the measurement.

    Returns:
        Exit code: 0; 1 where a mixer failed (the others are measured and reported).

    Raises:
        UserError: arguments that do not fit.
    """
    arguments = _parser(prog).parse_args(argv)
    device = choose_device(arguments.device)
    defaults = _DEFAULTS[device.type]
    lengths = sorted(set(arguments.lengths or defaults['lengths']))
    tokens, d_model = arguments.tokens or max(defaults['tokens'], lengths[-1]), arguments.d_model or defaults['d_model']
    if tokens < lengths[-1]:
        raise UserError(f'--tokens {tokens}: a call holds a whole sequence, and the longest has {lengths[-1]} tokens')
    dtype = DTYPES[arguments.dtype or defaults['dtype']]
    names = [*ATTENTIONS, *_names(arguments.mixers)]
    for name in names:
        try:
            make_mixer(name, d_model, lengths[0], torch.device('meta'))
        except (TypeError, ValueError) as error:
            raise UserError(f'{name} cannot be built with --d-model {d_model}: {error}') from error
    output = arguments.output or Path('output') / f'efficiency-length-{device.type}-{time.strftime("%Y%m%d-%H%M%S")}'
    run = {
        'device': device_name(device),
        'dtype': str(dtype).removeprefix('torch.'),
        'd_model': d_model,
        'tokens': tokens,
        'rounds': arguments.rounds,
        'threads': torch.get_num_threads(),
        'mixers': sorted(names),
        'versions': versions(),
    }
    record = Record(output, run)

    console = stdout_console()
    groups = [(mode, length) for mode in dict.fromkeys(arguments.mode) for length in lengths]
    to_do = record.to_do(groups, names)
    if len(to_do) < len(groups):
        console.print(f'{len(groups) - len(to_do)} of {len(groups)} lengths and passes are measured already')
    console.print(f'every length is written to {output} when it is measured; --output {output} goes on', soft_wrap=True)
    for mode, length in to_do:
        console.print(f'... L = {length}, {max(1, tokens // length)} sequences, {PASSES[mode]}, {len(names)} mixers')
        points = measure_length(
            names,
            length,
            mode,
            device,
            tokens=tokens,
            d_model=d_model,
            dtype=dtype,
            rounds=arguments.rounds,
            burst=_BURST,
        )
        record.add(points)
        for point in points:
            if failed(point.status):
                console.print(f'{point.mixer}: {point.status}', soft_wrap=True, markup=False)
    points = record.points
    rows = crossing_rows(points)
    if rows:
        write_csv(output / 'crossings.csv', rows)
    where = f'{run["device"]}, {run["dtype"]}, width {d_model}, {tokens} tokens a call'
    plot_points(points, output / 'efficiency_length.png', where)
    title = f'efficiency length: from how many tokens on a mixer costs less than attention ({where})'
    console.print(make_table(title, COLUMNS, table_lines(rows), right=range(2, len(COLUMNS))))
    console.print(
        'growth: of the time a token, or of the memory of a call with a fixed number of tokens, fitted to the longest '
        "lengths; 'always': cheaper at every length measured; attention: timm's block of the same width"
    )
    console.print(f'wrote {output}: ' + ', '.join(sorted(path.name for path in output.iterdir())), soft_wrap=True)
    failures = sum(failed(point.status) for point in points)
    if failures:
        console.print(f'{failures} of {len(points)} points failed, see points.csv; the same command tries them again')
    return 1 if failures else 0


def _names(given: Optional[list[str]]) -> list[str]:
    known = variants()
    for name in given or ():
        if name not in known:
            raise UserError(f'--mixers: unknown {name!r}{nearest(name, known)}; known: {"; ".join(known)}')
    return list(dict.fromkeys(given)) if given else list(known)


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description='Measure from which sequence length on each mixer costs less than attention, in time and in '
        'memory: against unfused attention and against scaled_dot_product_attention. With the same --output the same '
        'command continues where it stopped.',
        epilog="Mixers whose name ends in ', fixed' have a matrix that does not depend on the image.",
    )
    add = parser.add_argument
    add('--device', metavar='NAME', help='cpu, cuda or cuda:N; default: cuda where there is one')
    add('--mixers', type=_names_list, metavar='LIST', help="separated by ';'; default: the whole family")
    add('--lengths', type=positive_list, metavar='LIST', help='default: 64 to 16384 on CUDA, 64 to 512 on the CPU')
    add(
        '--tokens',
        type=positive,
        metavar='N',
        help='of a call, over all its sequences; default 16384 (CPU: 512), the longest length if that is more',
    )
    add('--d-model', type=positive, metavar='N', help='width; default 384 (CPU: 64)')
    add('--dtype', choices=DTYPES, help='of the computation; default bfloat16 on CUDA (autocast), float32 on the CPU')
    add('--mode', type=_modes, default=list(PASSES), metavar='LIST', help='infer, train or both: infer,train (default)')
    add('--rounds', type=rounds, default=MIN_ROUNDS, metavar='N', help=f'default {MIN_ROUNDS}')
    add('--output', type=Path, metavar='FOLDER', help='for CSV, PNG, JSON; default: output/efficiency-length-...')
    return parser


def _names_list(text: str) -> list[str]:
    return [part.strip() for part in text.split(';')]


def _modes(text: str) -> list[str]:
    for part in comma_list(text):
        if part not in PASSES:
            raise argparse.ArgumentTypeError(f'unknown mode {part!r}; allowed: {", ".join(PASSES)}')
    return comma_list(text)
