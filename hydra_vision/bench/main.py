"""The command `hydra-vision bench`: reads the arguments, plans the cases, measures, reports."""

import argparse
import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import torch
from rich.console import Console

from ..console import stdout_console
from ..environment import device_name, environment
from ..errors import UserError
from ..io import make_output
from .arguments import DEFAULTS, DTYPES, check_combination, choose_device, make_parser
from .goals import Verdict, check_goals, check_operator_goals
from .models import MODES, Case, Result, groups, run_group
from .operators import ATTENTION, OperatorCase, OperatorResult, Shape, run_shape
from .peers import unusable
from .planning import peer_of, plan_goals, plan_models, plan_operators
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

__all__ = ['main']


def main(argv: Optional[Sequence[str]] = None, prog: str = 'hydra-vision bench') -> int:
    """Run the benchmark.

    Returns:
        Exit code 0. A goal that is missed is printed as such; it is no error.

    Raises:
        UserError: arguments that do not fit.
    """
    arguments = make_parser(prog).parse_args(argv)
    check_combination(arguments)
    device = choose_device(arguments.device)
    defaults = DEFAULTS[device.type]
    dtype = DTYPES[arguments.dtype or defaults['dtype']]
    modes = arguments.mode or defaults['mode']
    console = stdout_console()
    with _threads(arguments.threads or defaults['threads']):
        if arguments.operator:
            cases: list = plan_operators(arguments, device, dtype, modes)
        elif arguments.cuda_graphs and (device.type == 'cpu' or arguments.compile == 'no'):
            raise UserError('--cuda-graphs needs a CUDA device and --compile')
        elif arguments.goals:
            cases = plan_goals(arguments, device)
            dtype = cases[0].dtype
        else:
            cases = plan_models(arguments, device, dtype, modes)
        if arguments.cuda_graphs:
            cases = [replace(case, graphs=case.compiled) for case in cases]
        facts = environment()
        default = facts['defaults'][device.type]
        if not default['available'] and any(case.backend == 'auto' for case in cases):
            reason = facts['backends'][default['backend']]['missing']
            raise UserError(
                f"backend 'auto' is {default['backend']} ({default['why']}), which cannot run here: {reason}"
            )
        stamp = time.strftime('%Y%m%d-%H%M%S')
        output = make_output(arguments.output or Path('output') / f'bench-{device.type}-{stamp}')
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
    ratios = model_ratios(results, peer_of([case.model for case in cases]))
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


@contextlib.contextmanager
def _threads(count: Optional[int]) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
