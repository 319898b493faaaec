"""The quasiseparable operator alone: our backends, its peers, and attention over the same tokens for scale.

A peer is the released algorithm, two causal scans as one of a doubled batch. Its scan is `mamba_ssm`'s SSD (in the
chunk length of the released module, and in shorter ones that may be faster), or flash-linear-attention's
`parallel_simple_gla`, the fastest of its kernels with one decay per token and head.

Each peer is measured twice. By its name: the complete operator as released, from the same arguments to the same result
as ours, with flips, concatenation, shift, sum of both halves and diagonal. With `/scan` behind its name: the call of
the scan alone, forward and backward, on inputs that were doubled and flipped before, and for `simple_gla` also repeated
for every head and multiplied by dt. That is less than the operator, and what the project's goal is stated against.
"""

import argparse
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hydra_vision.bench as bench
from hydra_vision.console import Parser, comma_list, positive
from hydra_vision.errors import UserError, first_line, nearest
from hydra_vision.io import write_csv
from hydra_vision.ops import quasiseparable_mix
from hydra_vision.ops.dispatch import BACKENDS, backend_reasons
from hydra_vision.ops.mamba_ssm import CHUNK_SIZE, double_batch, mix_by_scan, mix_mamba_ssm, ssd_scan
from hydra_vision.sdpa import ATTENTION, attention_backend, attention_that_ran
from hydra_vision.timing import Measurement, Step, measure

from . import read_goals, run
from .goals import print_verdicts, verdict

SDPA = 'sdpa'
SIMPLE_GLA = 'simple_gla'
_MAMBA_CHUNKS = {f'mamba_ssm/{size}': size for size in (128, 64)}
# Complete operators by name; 'mamba_ssm' has the chunks of the released module, 256.
PEERS = ('mamba_ssm', *_MAMBA_CHUNKS, SIMPLE_GLA)
SCANS = tuple(f'{name}/scan' for name in PEERS)
PASSES = {'infer': 'forward', 'train': 'forward+backward'}
_CHUNK = 128
_SHAPES = {'cpu': [(2, 196), (1, 1024)], 'cuda': [(256, 196), (49, 1024)]}
_HEADS = {'cpu': 6, 'cuda': 24}


@dataclass(frozen=True)
class Case:
    """One implementation at one shape: x is (B, L, H, P), B and C have one group of N.

    ``name`` is a backend of ``quasiseparable_mix``, a peer, a peer's scan or 'sdpa': attention with heads of width P in
    a transformer as wide as the model around the operator (which expands by two). A scan alone is held against the
    floors of the whole operator.
    """

    name: str
    B: int
    L: int
    H: int
    P: int
    N: int
    mode: str
    dtype: torch.dtype
    attention: str = ''

    @property
    def heads(self) -> int:
        return max(1, self.H // 2) if self.name == SDPA else self.H

    def columns(self) -> dict[str, Any]:
        """Columns of a CSV row that tell it from other rows."""
        sizes = {'B': self.B, 'L': self.L, 'H': self.heads, 'P': self.P, 'N': None if self.name == SDPA else self.N}
        return {'operator': self.name, **sizes, 'passes': PASSES[self.mode], 'attention': self.attention}

    @property
    def flops(self) -> int:
        """Of the matrix products: the cheaper of one quadratic pass and chunks of 128 with states.

        The heads share the scores C.B^T, both triangles are one pass. The backward pass counts twice the forward.
        """
        tokens, width = self.B * self.L, self.heads * self.P
        if self.name == SDPA:
            forward = 4 * tokens * self.L * width
        else:
            window = 2 * (self.N + width)  # per token and column of the matrix
            states = 8 * self.N * width  # write and read, both directions
            forward = tokens * min(window * self.L, window * _CHUNK + states)
        return forward * (1 if self.mode == 'infer' else 3)

    @property
    def traffic(self) -> int:
        """Bytes of every argument and result, each read or written once.

        The backward pass reads the arguments and the gradient of the result, and writes a gradient per argument.
        """
        result = self.heads * self.P * self.dtype.itemsize
        arguments = 3 * result
        if self.name != SDPA:  # dt_f, dt_b and D are float32
            arguments = result + 4 * self.N * self.dtype.itemsize + 3 * self.H * 4
        forward = arguments + result
        return self.B * self.L * (forward if self.mode == 'infer' else 2 * forward + arguments)


# Peers


def _gla_inputs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads = x.shape[2] // B.shape[2]
    k, q = (t.repeat_interleave(heads, dim=2) for t in (B, C))  # it has no groups
    return q, k, (x * dt.unsqueeze(-1)).to(x.dtype), A * dt


def _gla_scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    from fla.ops.simple_gla import parallel_simple_gla

    return parallel_simple_gla(q, k, v, g=g, scale=1.0)[0]


def mix_simple_gla(*arguments: Tensor, **named: Tensor) -> Tensor:
    """y = M x by flash-linear-attention. Arguments as in ``quasiseparable_mix``; CUDA tensors only."""
    return mix_by_scan(lambda *doubled: _gla_scan(*_gla_inputs(*doubled)), *arguments, **named)


def implementation(name: str) -> Callable[..., Tensor]:
    """The complete operator by the name of a backend or a peer; arguments of ``quasiseparable_mix`` by name."""
    if name == SIMPLE_GLA:
        return mix_simple_gla
    if name in _MAMBA_CHUNKS:
        return partial(mix_mamba_ssm, chunk_size=_MAMBA_CHUNKS[name])
    return partial(quasiseparable_mix, backend=name)


def scan_alone(name: str, arguments: Mapping[str, Tensor]) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The scan of a peer, and what it is called with.

    Args:
        name: One of ``SCANS``.
        arguments: Of ``quasiseparable_mix``, by name. The diagonal D is no part of a scan.

    Returns:
        The scan, and its inputs: new tensors that depend on no argument, the doubled batch among them.
        ``join_directions`` of the scan's result is M x without its diagonal.
    """
    peer = name.removesuffix('/scan')
    inputs = double_batch(**{key: t for key, t in arguments.items() if key != 'D'})
    scan: Callable[..., Tensor] = partial(ssd_scan, chunk_size=_MAMBA_CHUNKS.get(peer, CHUNK_SIZE))
    if peer == SIMPLE_GLA:
        scan, inputs = _gla_scan, _gla_inputs(*inputs)
    return scan, [t.detach().clone() for t in inputs]


def unusable(device: torch.device) -> dict[str, str | None]:
    """Every backend, peer and scan with None where it computes on ``device``, else the reason why not."""
    reasons = backend_reasons()
    missing = importlib.util.find_spec('fla') is None
    reasons[SIMPLE_GLA] = "the package fla-core is not installed (pip install 'hydra-vision[fla]')" if missing else None
    for name in ('triton', 'mamba_ssm', SIMPLE_GLA):
        if reasons[name] is None and device.type != 'cuda':
            reasons[name] = 'it computes on CUDA'
    for name, module in (('mamba_ssm', 'mamba_ssm.ops.triton.ssd_combined'), (SIMPLE_GLA, 'fla.ops.simple_gla')):
        if reasons[name] is None:
            try:  # installed is not enough: compiled extensions break with other versions of torch
                importlib.import_module(module)
            except ImportError as error:
                reasons[name] = f'{module} cannot be imported: {first_line(error)}'
    reasons |= dict.fromkeys(_MAMBA_CHUNKS, reasons['mamba_ssm'])
    reasons |= {name: reasons[name.removesuffix('/scan')] for name in SCANS}
    return {name: reasons[name] for name in dict.fromkeys((*BACKENDS, *PEERS, *SCANS))}


# What is timed


def operator_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Random arguments as an initialised mixer produces them: dt in [1e-3, 0.1], A = -1, the diagonal per token."""

    def normal(*size: int) -> Tensor:
        return torch.randn(case.B, case.L, *size, device=device)

    arguments = {'x': normal(case.H, case.P).to(case.dtype)}
    for name in ('dt_f', 'dt_b'):
        arguments[name] = torch.empty(case.B, case.L, case.H, device=device).uniform_(1e-3, 0.1)
    arguments['A'] = -torch.ones(case.H, device=device)
    for name in ('B_f', 'C_f', 'B_b', 'C_b'):
        arguments[name] = normal(1, case.N).to(case.dtype)
    arguments['D'] = normal(case.H)
    return arguments


def build_step(case: Case, arguments: dict[str, Tensor], attention: str = 'auto') -> Step:
    """The call that is timed. ``arguments`` are shared by the cases of a shape and not changed."""
    if case.name == SDPA:
        size = (case.B, case.heads, case.L, case.P)
        inputs = [torch.randn(size, device=arguments['x'].device, dtype=case.dtype) for _ in range(3)]

        def forward() -> Tensor:
            with attention_backend(attention):
                return F.scaled_dot_product_attention(*inputs)

    elif case.name in SCANS:
        scan, inputs = scan_alone(case.name, arguments)
        forward = partial(scan, *inputs)
    else:
        named = {name: t.clone() for name, t in arguments.items()}  # its own: they count as its memory
        inputs = list(named.values())
        forward = partial(implementation(case.name), **named)

    def infer() -> Tensor:
        with torch.no_grad():
            return forward()

    if case.mode == 'infer':
        return infer
    for t in inputs:
        t.requires_grad_()
    gradient = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), inputs, gradient)


def time_shape(
    cases: Sequence[Case], device: torch.device, *, attention: str = 'auto', **how
) -> dict[Case, Measurement]:
    """Time the implementations of one shape and mode on the same arguments; keyed with the attention that ran."""
    arguments = operator_inputs(cases[0], device)
    ran: dict[Case, str] = {}

    def build(case: Case) -> Step:
        step = build_step(case, arguments, attention)
        ran[case] = attention_that_ran(step, device) or 'math' if case.name == SDPA else ''
        return step

    found = measure({case: partial(build, case) for case in cases}, device, **how)
    return {replace(case, attention=ran.get(case, '')): measured for case, measured in found.items()}


# The command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        Exit code: 0; 1 where one of our backends failed. What another project's kernel cannot do here is a row.

    Raises:
        UserError: Arguments that do not fit, before any work is done.
    """
    arguments = _parser().parse_args(argv)
    device, amp = bench.timing_device(arguments)
    names = _names(arguments.operators, unusable(device))
    sizes = (arguments.heads or _HEADS[device.type], arguments.headdim, arguments.d_state)
    session = bench.start_run(arguments, 'operators', attention=arguments.attention)
    how = {'attention': arguments.attention, 'rounds': arguments.rounds, 'time_limit': arguments.time_limit}
    results: dict[Case, Measurement] = {}
    for shape in arguments.shapes or _SHAPES[device.type]:
        for mode in arguments.mode:
            cases = [Case(name, *shape, *sizes, mode, amp or torch.float32) for name in names]
            session.progress(f'{len(cases)} variants, B {shape[0]}, L {shape[1]}, {PASSES[mode]}')
            results |= time_shape(cases, device, **how)
            rows = [_row(case, results, session) for case in results]
            write_csv(session.output / 'operators.csv', rows)  # a run that is cut off keeps these
            write = ((case.columns(), measured) for case, measured in results.items())
            bench.write_samples(session.output / 'samples.csv', write)
    columns = {key: key for key in ('B', 'L', 'H', 'P', 'N', 'passes', 'operator', 'attention')}
    columns |= {'median_ms': 'median ms', 'p10_ms': '10 %', 'p90_ms': '90 %', 'peak_memory_gib': 'GiB'}
    columns |= {'gemm_floor_share': 'GEMM floor / time', 'memory_floor_share': 'memory floor / time'}
    columns |= {'over_peer': 'speed / best peer', 'over_scan': 'speed / best scan alone', 'over_sdpa': 'speed / sdpa'}
    session.console.print(bench.result_table('quasiseparable_mix', rows, columns))
    print_verdicts(session, verdicts(results, device))
    for name, reason in unusable(device).items():
        if reason is not None:
            session.console.print(f'not measured: {name} ({reason})')
    session.list_files()
    return 1 if any(measured.failed and case.name in BACKENDS for case, measured in results.items()) else 0


def _row(case: Case, results: Mapping[Case, Measurement], session: bench.Run) -> dict[str, Any]:
    measured = results[case]
    over = {'over_peer': PEERS, 'over_scan': SCANS, 'over_sdpa': (SDPA,)}
    return {
        **case.columns(),
        **session.columns,
        **measured.columns(),
        **session.roofline.shares(case.flops, case.traffic, measured.median),
        **{key: _speed_over(case, results, names) for key, names in over.items()},
    }


def _place(case: Case) -> tuple:
    return case.B, case.L, case.H, case.P, case.N, case.mode, case.dtype


def _speed_over(case: Case, results: Mapping[Case, Measurement], names: Sequence[str]) -> float | None:
    """Speed over that of the fastest of ``names`` in the same place."""
    times = [m.median for c, m in results.items() if c.name in names and _place(c) == _place(case) and m.timing]
    return round(min(times) / results[case].median, 4) if times and results[case].timing else None


def verdicts(results: Mapping[Case, Measurement], device: torch.device) -> list[dict[str, Any]]:
    """Rows of goals.csv where ours and all that it is held against were measured.

    The fastest of some would be an easier goal than the fastest of all. Against complete peers there is no goal.
    """
    rows = []
    for goal in read_goals()['operator']:
        for mode, passes in PASSES.items():
            place = (goal['batch'], goal['length'], 24, 64, 64, mode, torch.bfloat16)
            timings = {case.name: m.timing for case, m in results.items() if _place(case) == place and m.timing}
            for what, others, limit in (('best scan alone', SCANS, goal[mode]), ('best complete peer', PEERS, None)):
                if device.type == 'cuda' and timings.keys() >= {'triton', *others}:
                    other = min((timings[name] for name in others), key=lambda timing: timing.median)
                    title = f'quasiseparable_mix, {passes}, B {place[0]}, L {place[1]}, speed / {what}'
                    rows.append(verdict(title, *bench.speed_ratio(timings['triton'], other), at_least=limit))
    return rows


def _names(given: list[str] | None, reasons: Mapping[str, str | None]) -> list[str]:
    """What runs: as given, or everything that can; attention in any case."""
    for name in given or ():
        if name not in reasons:
            raise UserError(f'--operators: unknown {name!r}{nearest(name, reasons)}')
        if reasons[name] is not None:
            raise UserError(f'--operators: {name} cannot run here: {reasons[name]}')
    return [*(given or [name for name, reason in reasons.items() if reason is None]), SDPA]


def _shapes(text: str) -> list[tuple[int, int]]:
    shapes = []
    for part in comma_list(text):
        batch, times, length = part.partition('x')
        if not times:
            raise argparse.ArgumentTypeError(f'{part!r} is not BATCHxLENGTH, for example 256x196')
        shapes.append((positive(batch), positive(length)))
    return shapes


def _parser() -> Parser:
    parser = Parser(
        prog='python -m benchmarks.operators',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        example='python -m benchmarks.operators --shapes 256x196 --operators triton,mamba_ssm/128,mamba_ssm/128/scan',
    )
    add = parser.add_argument
    names = ', '.join(dict.fromkeys((*BACKENDS, *PEERS, *SCANS)))
    add('--operators', type=comma_list, metavar='LIST', help=f'of {names}; default: all that run here')
    add('--shapes', type=_shapes, metavar='LIST', help='BATCHxLENGTH, for example 256x196,49x1024')
    add('--heads', type=positive, metavar='H', help='default 24 on CUDA, 6 on the CPU')
    add('--headdim', type=positive, default=64, metavar='P', help='default 64')
    add('--d-state', type=positive, default=64, metavar='N', help='default 64')
    add('--mode', type=bench.choices(PASSES), default=list(PASSES), metavar='LIST', help='infer,train (both)')
    add('--attention', choices=ATTENTION, default='auto', help="of sdpa; auto: PyTorch's choice")
    bench.add_timing_arguments(parser)
    return parser


if __name__ == '__main__':
    run(main, 'operators')
