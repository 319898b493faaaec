"""The command `hydra-vision bench`: reads the arguments, plans the cases, measures, reports."""

import argparse
import contextlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import torch
from rich.console import Console

from ..command_line import Parser, UserError, check_model_name, comma_list, nearest, positive, positive_list
from ..environment import device_name, environment
from ..ops.dispatch import BACKENDS
from ..tables import stdout_console
from .counting import count_model, family_models
from .goals import Verdict, check_goals, check_operator_goals, goal_cases
from .models import MODES, Case, Result, groups, run_group
from .operators import ATTENTION, OperatorCase, OperatorResult, Shape, run_shape
from .peers import PEERS as OPERATOR_PEERS
from .peers import SCANS, unusable
from .plot import plot_results
from .report import (
    model_ratios,
    model_row,
    model_table,
    operator_row,
    operator_table,
    ratio_table,
    sample_rows,
    verdict_row,
    verdict_table,
    write_csv,
)
from .roofline import Roofline, measure_roofline
from .timing import MIN_ROUNDS, rounds

__all__ = ['PEERS', 'main']

# timm's ViT of the same width and patch.
PEERS = {
    'test_hydra_vit': 'test_vit',
    'hydra_vit_nano': 'deit_tiny_patch16_224',
    'hydra_vit_tiny': 'deit_tiny_patch16_224',
    'hydra_vit_small': 'deit_small_patch16_224',
    'hydra_vit_base': 'vit_base_patch16_224',
    'hydra_vit_large': 'vit_large_patch16_224',
}
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}

# What runs when nothing is asked for: on each device the comparison that the project's goals are about.
_DEFAULTS: dict[str, dict[str, Any]] = {
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


def main(argv: Optional[Sequence[str]] = None, prog: str = 'hydra-vision bench') -> int:
    """Run the benchmark.

    Returns:
        Exit code 0. A goal that is missed is printed as such; it is no error.

    Raises:
        UserError: arguments that do not fit.
    """
    arguments = _parser(prog).parse_args(argv)
    _check_combination(arguments)
    device = _device(arguments.device)
    defaults = _DEFAULTS[device.type]
    dtype = DTYPES[arguments.dtype or defaults['dtype']]
    modes = arguments.mode or defaults['mode']
    console = stdout_console()
    with _threads(arguments.threads or defaults['threads']):
        if arguments.operator:
            cases: list = _plan_operators(arguments, device, dtype, modes)
        elif arguments.cuda_graphs and (device.type == 'cpu' or arguments.compile == 'no'):
            raise UserError('--cuda-graphs needs a CUDA device and --compile')
        elif arguments.goals:
            cases = _plan_goals(arguments, device)
            dtype = cases[0].dtype
        else:
            cases = _plan_models(arguments, device, dtype, modes)
        if arguments.cuda_graphs:
            cases = [replace(case, graphs=case.compiled) for case in cases]
        facts = environment()
        default = facts['defaults'][device.type]
        if not default['available'] and any(case.backend == 'auto' for case in cases):
            reason = facts['backends'][default['backend']]['missing']
            raise UserError(
                f"backend 'auto' is {default['backend']} ({default['why']}), which cannot run here: {reason}"
            )
        output = _output_folder(arguments.output, device)
        facts['run'] = {
            'device': str(device),
            'device_name': device_name(device),
            'dtype': str(dtype).removeprefix('torch.'),
            'threads': torch.get_num_threads(),
            'started': time.strftime('%Y-%m-%dT%H:%M:%S%z'),
        }
        _print_header(console, facts, cases)
        roofline = measure_roofline(device, dtype)
        console.print(f'measured {roofline} (large random matrices; bytes read + written)')
        if arguments.operator:
            _bench_operators(cases, device, roofline, arguments, console, output)
        else:
            _bench_models(cases, device, roofline, arguments, console, output)
    facts['roofline'] = {'flops_per_second': roofline.flops_per_second, 'bytes_per_second': roofline.bytes_per_second}
    (output / 'environment.json').write_text(json.dumps(facts, indent=2) + '\n')
    console.print(f'wrote {output}: ' + ', '.join(sorted(path.name for path in output.iterdir())), soft_wrap=True)
    return 0


def _bench_models(
    cases: list[Case],
    device: torch.device,
    roofline: Roofline,
    arguments: argparse.Namespace,
    console: Console,
    output: Path,
) -> None:
    run = {'device': device_name(device), 'threads': torch.get_num_threads()}
    results: list[Result] = []
    for group in groups(cases, device):
        results += run_group(
            group,
            device,
            roofline,
            rounds=arguments.repeats,
            time_limit=arguments.time_limit,
            progress=lambda text: console.print(f'... {text}'),
        )
        write_csv(output / 'results.csv', [model_row(result, run) for result in results])  # a cut-off run keeps these
        _write_samples(output, results)
    dtype = str(cases[0].dtype).removeprefix('torch.')
    executions = ' and '.join(dict.fromkeys(case.execution for case in cases))
    plot_results(results, output / 'results.png', f'{run["device"]}, {dtype}, {executions}')

    console.print(model_table(results))
    console.print(
        'GiB: peak of live tensors on the GPU, other variants left out; not measured on the CPU. Floors: the time that '
        'the products with weights alone, or the unavoidable memory traffic alone, would take at the measured rates '
        '(hydra_vision/bench/counting.py defines both); 100 % is the floor.'
    )
    ratios = model_ratios(results, _peer_of([case.model for case in cases]))
    if ratios:
        console.print(ratio_table(ratios))
    _report_goals(check_goals(results, device), device, console, output)


def _bench_operators(
    cases: list[OperatorCase],
    device: torch.device,
    roofline: Roofline,
    arguments: argparse.Namespace,
    console: Console,
    output: Path,
) -> None:
    run = {'device': device_name(device), 'threads': torch.get_num_threads()}
    results: list[OperatorResult] = []
    together: dict[tuple[Shape, str], list[OperatorCase]] = {}
    for case in cases:
        together.setdefault((case.shape, case.mode), []).append(case)
    for group in together.values():
        results += run_shape(
            group,
            device,
            roofline,
            rounds=arguments.repeats,
            time_limit=arguments.time_limit,
            progress=lambda text: console.print(f'... {text}'),
        )
        write_csv(output / 'operators.csv', [operator_row(result, run) for result in results])
        _write_samples(output, results)
    console.print(operator_table(results))
    console.print(
        f'{ATTENTION}: attention of the transformer as wide as the model around the operator (half the heads), for '
        'scale. Peers, complete and /scan: hydra_vision/bench/peers.py; a goal needs all of them. Floors: '
        'hydra_vision/bench/operators.py defines both.'
    )
    _report_goals(check_operator_goals(results, device), device, console, output)
    missing: dict[str, list[str]] = {}
    for name, reason in unusable(device).items():
        if reason is not None:
            missing.setdefault(reason, []).append(name)
    for reason, names in missing.items():
        console.print(f'not measured: {", ".join(names)} ({reason})')


def _report_goals(verdicts: list[Verdict], device: torch.device, console: Console, output: Path) -> None:
    if not verdicts:
        return
    console.print(verdict_table(verdicts))
    write_csv(output / 'goals.csv', [verdict_row(verdict) for verdict in verdicts])
    stated, here = ('2 threads', torch.get_num_threads()) if device.type == 'cpu' else ('an H200', device_name(device))
    console.print(f'the goals are stated for {stated}; this run used {here}')


def _write_samples(output: Path, results: 'list[Result] | list[OperatorResult]') -> None:
    rows = sample_rows(results)
    if rows:  # none where nothing fitted into memory
        write_csv(output / 'samples.csv', rows)


def _plan_goals(arguments: argparse.Namespace, device: torch.device) -> list[Case]:
    """The rows that the project's goals compare; --mode and --img-sizes take a part of them."""
    cases = goal_cases(device)
    sizes = sorted({case.img_size for case in cases})
    for size in arguments.img_sizes or ():
        if size not in sizes:
            raise UserError(f'--img-sizes: no goal is about {size} px; allowed with --goals: {sizes}')
    cases = [case for case in cases if case.img_size in (arguments.img_sizes or sizes)]
    cases = [case for case in cases if case.mode in (arguments.mode or MODES)]
    if not cases:
        raise UserError(f'--mode: no goal for {device.type} is about {",".join(arguments.mode)}')
    return cases


def _plan_models(
    arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype, modes: list[str]
) -> list[Case]:
    defaults = _DEFAULTS[device.type]
    names = list(dict.fromkeys(arguments.models or defaults['models']))
    for name in names:
        check_model_name(name)
    family = family_models()
    if arguments.peers is not False:
        peers = [PEERS[name] for name in names if name in PEERS]
        names = list(dict.fromkeys([*names, *peers]))
    img_sizes = arguments.img_sizes or defaults['img_sizes']
    batches = _batch_sizes(arguments.batch_sizes, img_sizes, device)
    compiled = {'no': [False], 'only': [True], 'both': [False, True]}[arguments.compile or defaults['compile']]

    usable = unusable(device)
    if arguments.backend:
        for name in arguments.backend:
            if name in usable and name not in BACKENDS:
                raise UserError(f'--backend: no model computes with {name}, which needs --operator')
        _check_backends(arguments.backend, {name: usable[name] for name in BACKENDS})
        if not any(name in family for name in names):
            raise UserError(f'--backend chooses how a Hydra model computes; none is in {",".join(names)}')
        backends = arguments.backend
    else:  # beside the default: the released algorithm, where its kernels are there
        backends = ['auto'] + (['mamba_ssm'] if usable['mamba_ssm'] is None else [])

    for name in names:
        for img_size in img_sizes:
            try:
                count_model(name, img_size)
            except (AssertionError, ValueError, RuntimeError) as error:
                raise UserError(f'{name} cannot run at {img_size} px: {str(error).splitlines()[0]}') from error
    return [
        Case(name, img_size, batch, mode, is_compiled, dtype, backend)
        for mode in modes
        for img_size, batch in zip(img_sizes, batches)
        for is_compiled in compiled
        for name in names
        for backend in (backends if name in family else [None])
    ]


def _plan_operators(
    arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype, modes: list[str]
) -> list[OperatorCase]:
    defaults = _DEFAULTS[device.type]
    usable = unusable(device)
    if arguments.backend:
        _check_backends(arguments.backend, usable)
    names = arguments.backend or [name for name, reason in usable.items() if reason is None]
    heads = arguments.heads or defaults['heads']
    shapes = [
        Shape(batch, length, heads, arguments.headdim or 64, arguments.d_state or 64)
        for batch, length in arguments.shapes or defaults['shapes']
    ]
    return [
        OperatorCase(name, shape, mode, dtype) for shape in shapes for mode in modes for name in [*names, ATTENTION]
    ]


def _check_backends(names: list[str], usable: dict[str, Optional[str]]) -> None:
    for name in names:
        if name == 'auto':
            continue
        if name not in usable:
            raise UserError(f'--backend: unknown backend {name!r}{nearest(name, usable)}')
        if usable[name] is not None:
            raise UserError(f'--backend: {name} cannot run here: {usable[name]}')


def _batch_sizes(given: Optional[list[int]], img_sizes: list[int], device: torch.device) -> list[int]:
    if given is None:
        if device.type == 'cpu':
            return [8 if img_size <= 224 else 1 for img_size in img_sizes]
        # 256 at 224 px, fewer for more tokens, to the nearest power of two: 64 at 512 px, 16 at 1024 px
        return [2 ** max(0, round(math.log2(256 * (224 / img_size) ** 2))) for img_size in img_sizes]
    if len(given) == 1:
        return given * len(img_sizes)
    if len(given) != len(img_sizes):
        raise UserError(
            f'--batch-sizes has {len(given)} values for {len(img_sizes)} image sizes '
            f'({",".join(map(str, img_sizes))}); give one, or one for each'
        )
    return given


def _peer_of(names: Sequence[str]) -> dict[str, str]:
    """Each Hydra model's peer in this run: its own, else the first model that is not ours."""
    family = family_models()
    others = [name for name in names if name not in family]
    peers = {}
    for name in names:
        if name in family and others:
            peers[name] = PEERS[name] if PEERS.get(name) in others else others[0]
    return peers


def _print_header(console: Console, facts: dict[str, Any], cases: Sequence[Any]) -> None:
    """What the numbers depend on, and what is timed."""
    run, precision = facts['run'], facts['precision']
    installed = [f'{name} {version}' for name, version in facts['versions'].items() if version is not None]
    console.print(f'device {run["device"]}: {run["device_name"]}, {run["threads"]} CPU threads')
    console.print(', '.join(installed))
    tf32 = 'off' if precision['float32_matmul_precision'] == 'highest' else 'allowed'
    cudnn = 'allowed' if precision['cudnn_allow_tf32'] else 'off'
    console.print(f'dtype {run["dtype"]}, TF32 {tf32} in matrix products, {cudnn} in cuDNN (used on CUDA only)')
    if isinstance(cases[0], Case):
        if run['dtype'] != 'float32':
            console.print(f'weights in float32, autocast to {run["dtype"]}')
        for mode in dict.fromkeys(case.mode for case in cases):
            console.print(MODES[mode])
        default = facts['defaults'][run['device'].partition(':')[0]]
        console.print(f"backend 'auto' of the Hydra models: {default['backend']} ({default['why']})")


def _device(name: Optional[str]) -> torch.device:
    if name is None:
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f'--device {name!r}: {str(error).splitlines()[0]}') from error
    if device.type not in _DEFAULTS:
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


def _output_folder(given: Optional[Path], device: torch.device) -> Path:
    output = given or Path('output') / f'bench-{device.type}-{time.strftime("%Y%m%d-%H%M%S")}'
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--output {str(output)!r}: {error.strerror}') from error
    return output


@contextlib.contextmanager
def _threads(count: Optional[int]) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_combination(arguments: argparse.Namespace) -> None:
    """An option of the other kind of benchmark would do nothing."""
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


def _parser(prog: str) -> Parser:
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
        f'(with --operator: every one that runs, {", ".join(OPERATOR_PEERS[1:])}, and the scan of each peer alone, on '
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
