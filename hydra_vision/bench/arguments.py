"""Arguments of `hydra-vision bench`: what is allowed, with what, on which device."""

import argparse
from pathlib import Path
from typing import Any, Optional

import torch

from ..console import Parser, comma_list, positive, positive_list
from ..errors import UserError
from ..ops.dispatch import BACKENDS
from .models import MODES
from .peers import PEERS, SCANS
from .timing import MIN_ROUNDS, rounds

__all__ = ['DEFAULTS', 'DTYPES', 'check_combination', 'choose_device', 'make_parser']

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}

# What runs when nothing is asked for: on each device the comparison that the project's goals are about.
DEFAULTS: dict[str, dict[str, Any]] = {
    'cpu': {
        'models': ['hydra_vit_tiny'],
        'img_sizes': [224, 448, 896, 1024],
        'mode': ['infer'],
        'dtype': 'float32',
        'compile': 'no',
        'threads': 2,
        'shapes': [(2, 196), (1, 1024)],
        'heads': 6,
    },
    'cuda': {
        'models': ['hydra_vit_base'],
        'img_sizes': [224, 512, 1024],
        'mode': ['infer', 'train'],
        'dtype': 'bfloat16',
        'compile': 'only',
        'threads': None,
        'shapes': [(256, 196), (49, 1024)],
        'heads': 24,
    },
}
_MODEL_OPTIONS = ('models', 'img_sizes', 'batch_sizes', 'compile', 'peers', 'cuda_graphs')
_OPERATOR_OPTIONS = ('shapes', 'heads', 'headdim', 'd_state')
_FIXED_BY_GOALS = ('models', 'batch_sizes', 'compile', 'peers', 'dtype', 'backend')


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number of seconds')
    return value


def _modes(text: str) -> list[str]:
    for part in comma_list(text):
        if part not in MODES:
            raise argparse.ArgumentTypeError(f'unknown mode {part!r}; allowed: {", ".join(MODES)}')
    return list(dict.fromkeys(comma_list(text)))


def _shapes(text: str) -> list[tuple[int, int]]:
    shapes = []
    for part in comma_list(text):
        batch, times, length = part.partition('x')
        if not times:
            raise argparse.ArgumentTypeError(f'{part!r} is not BATCHxLENGTH, for example 256x196')
        shapes.append((positive(batch), positive(length)))
    return shapes


def make_parser(prog: str) -> Parser:
    """Of the command line, whose program is called ``prog``."""
    parser = Parser(
        prog=prog,
        description='Time models against their peers, in turns in one process; with --operator the operator alone.',
        epilog='Without options: on the CPU hydra_vit_tiny against deit_tiny (float32, 2 threads), on CUDA '
        'hydra_vit_base against vit_base (bfloat16 autocast, compiled), with the goals of the project checked; --goals '
        'runs all that they are about.',
    )
    add = parser.add_argument
    add('--device', metavar='NAME', help='cpu, cuda or cuda:N; default: cuda where there is one')
    add('--mode', type=_modes, metavar='LIST', help='infer, train or both: infer,train')
    add(
        '--dtype', choices=DTYPES, help='of the computation; weights stay float32 (autocast). Default: bfloat16 on CUDA'
    )
    add(
        '--backend',
        type=comma_list,
        metavar='LIST',
        help=f'of the Hydra operator: auto, {", ".join(BACKENDS)}; default: auto, and mamba_ssm where it runs '
        f'(with --operator: every one that runs, {", ".join(PEERS[1:])}, and the scan of each peer alone, on '
        f'a batch doubled beforehand: {", ".join(SCANS)})',
    )
    add('--threads', type=positive, metavar='N', help="CPU threads; default: 2 on the CPU, torch's own with a GPU")
    add('--repeats', type=rounds, default=20, metavar='N', help='rounds at most, each variant once a round; default 20')
    add(
        '--time-limit',
        type=_seconds,
        default=30.0,
        metavar='S',
        help=f'seconds of measuring for each image size (or shape) and mode, after {MIN_ROUNDS} rounds; default 30',
    )
    add('--output', type=Path, metavar='FOLDER', help='for CSV, PNG and JSON; default: output/bench-DEVICE-TIME')
    models = parser.add_argument_group('models')
    models.add_argument(
        '--goals',
        action='store_true',
        help="every row that the project's goals for this device compare, and the ratios; --mode and --img-sizes take "
        'a part of them',
    )
    models.add_argument('--models', type=comma_list, metavar='LIST', help='timm model names')
    models.add_argument('--img-sizes', type=positive_list, metavar='LIST', help='sides in px')
    models.add_argument(
        '--batch-sizes', type=positive_list, metavar='LIST', help='one for each image size, or one for all'
    )
    models.add_argument(
        '--compile',
        nargs='?',
        const='only',
        choices=('only', 'both'),
        help='torch.compile; "--compile both" times eager mode as well. Default on CUDA',
    )
    models.add_argument(
        '--no-compile', dest='compile', action='store_const', const='no', help='eager mode. Default on the CPU'
    )
    models.add_argument(
        '--cuda-graphs',
        action='store_true',
        default=None,
        help="compile every model with mode='reduce-overhead': small models are else bound by the host",
    )
    models.add_argument(
        '--peers',
        action=argparse.BooleanOptionalAction,
        help="add timm's ViT of the same width for each Hydra model (the default), or not",
    )
    operator = parser.add_argument_group('operator')
    operator.add_argument('--operator', action='store_true', help='time quasiseparable_mix alone, for every backend')
    operator.add_argument('--shapes', type=_shapes, metavar='LIST', help='BATCHxLENGTH, for example 256x196,49x1024')
    operator.add_argument('--heads', type=positive, metavar='H')
    operator.add_argument('--headdim', type=positive, metavar='P', help='default 64')
    operator.add_argument('--d-state', type=positive, metavar='N', help='default 64')
    return parser


def check_combination(arguments: argparse.Namespace) -> None:
    """An option of the other kind of benchmark would do nothing.

    Raises:
        UserError: there is such an option.
    """
    if arguments.goals:
        if arguments.operator:
            raise UserError('--goals does not go with --operator, which checks its goals by itself')
        for name in _FIXED_BY_GOALS:
            if getattr(arguments, name) is not None:
                raise UserError(f'--goals says what runs: --{name.replace("_", "-")} does not go with it')
    ignored = _MODEL_OPTIONS if arguments.operator else _OPERATOR_OPTIONS
    for name in ignored:
        if getattr(arguments, name) is not None:
            verb = 'does not go with' if arguments.operator else 'needs'
            raise UserError(f'--{name.replace("_", "-")} {verb} --operator')


def choose_device(name: Optional[str]) -> torch.device:
    """The device by name, made the current one; the first GPU, or the CPU where there is none, without a name.

    Raises:
        UserError: a device that this machine has not, or on which nothing is timed.
    """
    if name is None:
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f'--device {name!r}: {str(error).splitlines()[0]}') from error
    if device.type not in DEFAULTS:
        raise UserError(f'--device {name!r}: times can be taken on cuda and cpu')
    if device.type == 'cuda':
        if not torch.cuda.is_available():
            raise UserError(
                f'--device {name!r}: this machine has no CUDA device that torch {torch.__version__} can see'
            )
        index = device.index or 0
        if index >= torch.cuda.device_count():
            raise UserError(f'--device {name!r}: there are {torch.cuda.device_count()} CUDA devices')
        torch.cuda.set_device(index)
        device = torch.device('cuda', index)
    return device
