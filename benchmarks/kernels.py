"""Time by kernel, from the profiler: of a whole model, or of everything between the two projections of a block.

    python -m benchmarks.kernels inner --batch 256 --length 196       # forward and backward of hydra_inner, its goal
    python -m benchmarks.kernels host --batch 1 --length 64           # the host's time of such a call
    python -m benchmarks.kernels model --model hydra_vit_base --execution compiled --mode train

Needs a CUDA device. hydra_vision/ops/triton/NOTES.md builds on these numbers.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import hydra_vision.bench as bench
from hydra_vision.console import Parser, check_model_name, image_size, positive
from hydra_vision.errors import UserError
from hydra_vision.flops import family_models
from hydra_vision.io import write_csv
from hydra_vision.ops import hydra_inner
from hydra_vision.sdpa import ATTENTION
from hydra_vision.timing import interleave

from . import read_goals, run

Call = Callable[[], object]


def kernel_times(step: Call, repeats: int = 4) -> list[dict[str, object]]:
    """One row per kernel of a call, longest first: milliseconds, and how many times it is launched."""
    for _ in range(3):  # compiles; a CUDA graph is recorded
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    events = [(e.key, e.count / repeats, e.device_time_total / repeats / 1e3) for e in trace.key_averages()]
    rows = [{'ms': round(ms, 4), 'count': round(count, 2), 'kernel': name} for name, count, ms in events if ms > 0]
    return sorted(rows, key=lambda row: -row['ms'])


def profile_case(case: bench.Case, session: bench.Run, shown: int = 25) -> None:
    """Print the kernels of one call of a model and write all of them to kernels_*.csv."""
    with bench.fresh_compiler():
        _, step = bench.build_step(case, session.device)
        rows = kernel_times(step)
    side = case.columns()['img_size']
    write_csv(
        session.output / f'kernels_{case.model}_{side}_{case.mode}_{case.execution}.csv',
        rows,
        ['ms', 'count', 'kernel'],
    )
    total = sum(row['ms'] for row in rows)
    title = f'{case.label}, {side} px, batch {case.batch}, {case.mode}, {case.execution}: {total:.2f} ms of kernels'
    lines = [{**row, 'kernel': row['kernel'][:100]} for row in rows[:shown]]
    session.console.print(bench.result_table(title, lines, {'ms': 'ms', 'count': 'launches', 'kernel': 'kernel'}))


def inner_calls(batch: int, length: int, heads: int, headdim: int, d_state: int) -> dict[str, Call]:
    """Forward, and forward with backward, of ``hydra_inner`` in bfloat16."""
    inner, width = heads * headdim, heads * headdim + 4 * d_state

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device='cuda')

    zxbcdt = normal(batch, length, inner + width + 2 * heads).bfloat16()
    conv, dt_bias = (normal(width, 1, 7) / 7**0.5, 0.1 * normal(width)), normal(heads) - 3
    ones = [torch.ones(heads, device='cuda'), normal(heads, inner) / inner**0.5, torch.ones(inner, device='cuda')]
    leaves = [t.requires_grad_() for t in (zxbcdt, *conv, dt_bias, torch.zeros(heads, device='cuda'), *ones)]
    gradient = normal(batch, length, inner).bfloat16()

    def forward() -> Tensor:
        return hydra_inner(*leaves, headdim=headdim, d_state=d_state)

    def infer() -> Tensor:
        with torch.no_grad():
            return forward()

    return {'infer': infer, 'train': lambda: torch.autograd.grad(forward(), leaves, gradient)}


def host_microseconds(call: Call, repeats: int = 100) -> float:
    """Until Python is done with a call, best of five. The host's own time only where the GPU keeps up: small sizes."""
    rounds = []
    for _ in range(6):  # the first one compiles
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        rounds.append((time.perf_counter() - start) / repeats * 1e6)
    return min(rounds[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    arguments = _parser().parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError('this measures on a CUDA device, and none is visible')
    device, dtype = bench.timing_device(arguments)
    if arguments.what == 'model':
        check_model_name(arguments.model)
        session = bench.start_run(arguments, 'kernels', attention=arguments.attention)
        backend = 'auto' if arguments.model in family_models() else None
        how = (arguments.mode, arguments.execution, dtype, backend, arguments.attention)
        profile_case(bench.Case(arguments.model, arguments.img_size, arguments.batch, *how), session)
        session.list_files()
        return 0
    sizes = (arguments.batch, arguments.length, arguments.heads, arguments.headdim, arguments.d_state)
    calls = inner_calls(*sizes)
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16')
    if arguments.what == 'host':
        forward, both = (host_microseconds(call) for call in calls.values())
        print(f'host: forward {forward:.0f} us, forward + backward {both:.0f} us')
        return 0
    for row in kernel_times(calls['train']):
        print(f'{row["ms"]:8.3f} ms  {row["count"]:4.0f}x  {row["kernel"][:90]}')
    times = interleave(calls, device, rounds=arguments.rounds, time_limit=arguments.time_limit)
    for mode, timing in times.items():
        limit = _limit(mode) if sizes == (256, 196, 24, 64, 64) else None
        goal = '' if limit is None else f', goal <= {limit:g}: {"met" if timing.median * 1e3 <= limit else "MISSED"}'
        print(f'{mode}: {timing.median * 1e3:.4f} ms per call{goal}')
    return 0


def _limit(mode: str) -> float | None:
    name = torch.cuda.get_device_name()
    return next((limits[mode] for gpu, limits in read_goals()['inner'].items() if gpu in name), None)


def _parser() -> Parser:
    parser = Parser(
        prog='python -m benchmarks.kernels', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('what', choices=('inner', 'host', 'model'), help='what to measure')
    add('--batch', type=positive, default=256, metavar='N')
    inner = parser.add_argument_group('inner, host')
    inner.add_argument('--length', type=positive, default=196, metavar='L', help='default 196')
    inner.add_argument('--heads', type=positive, default=24, metavar='H', help='default 24')
    inner.add_argument('--headdim', type=positive, default=64, metavar='P', help='default 64')
    inner.add_argument('--d-state', type=positive, default=64, metavar='N', help='default 64')
    model = parser.add_argument_group('model')
    model.add_argument('--model', default='hydra_vit_base', metavar='NAME', help='default hydra_vit_base')
    model.add_argument('--img-size', type=image_size, default=(224, 224), metavar='N', help='N or HxW; default 224')
    model.add_argument('--mode', choices=bench.MODES, default='train', help='default train')
    model.add_argument('--execution', choices=bench.EXECUTIONS, default='compiled', help='default compiled')
    model.add_argument('--attention', choices=ATTENTION, default='auto', help='of scaled_dot_product_attention')
    bench.add_timing_arguments(parser)
    return parser


if __name__ == '__main__':
    run(main, 'kernels')
