"""The project's speed goals: every row that they compare, measured in one process, and a verdict on each ratio.

The goals are data: `benchmarks/goals.yaml`. The peer runs with the backend of ``scaled_dot_product_attention`` that is
fastest at its shapes, measured first; every row names the one that ran.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import hydra_vision.bench as bench
from hydra_vision.console import Parser, comma_list, positive_list
from hydra_vision.errors import UserError
from hydra_vision.flops import create_model
from hydra_vision.io import write_csv
from hydra_vision.sdpa import ATTENTION, attention_shapes, fastest_attention
from hydra_vision.timing import Measurement

from . import GOALS, read_goals, run
from .kernels import profile_case


@dataclass(frozen=True)
class Goal:
    """Limits on one model: against a peer at the same size, or against itself at a base size.

    Attributes:
        infer, train: Of images/s over the peer's, at least; of the time per token over that at the base size, at most.
        memory: Of the peak memory of training over the peer's, at most.
        base: Image size and batch.
    """

    device: str
    model: str
    img_size: int
    batch: int
    execution: str
    peer: str | None = None
    base: tuple[int, int] | None = None
    infer: float | None = None
    train: float | None = None
    memory: float | None = None

    def pair(self, mode: str, dtype: torch.dtype | None) -> tuple[bench.Case, bench.Case]:
        """The two rows that are compared in a mode."""
        size = (self.img_size, self.img_size)
        ours = bench.Case(self.model, size, self.batch, mode, self.execution, dtype, 'auto')
        if self.base is None:
            return ours, replace(ours, model=self.peer, backend=None)
        return ours, replace(ours, img_size=(self.base[0], self.base[0]), batch=self.base[1])

    def verdicts(self, mode: str, ours: Measurement, other: Measurement) -> list[dict[str, Any]]:
        """Rows of goals.csv for a mode in which both were measured."""
        where = f'{self.model}, {mode}, {bench.EXECUTIONS[self.execution]}, {self.img_size} px'
        if self.base is not None:
            tokens = self.batch * self.img_size**2 / (self.base[1] * self.base[0] ** 2)
            ratio = ours.median / other.median / tokens
            return [verdict(f'time per token, {where} / {self.base[0]} px', ratio, at_most=getattr(self, mode))]
        ratio, lowest, highest = bench.speed_ratio(ours.timing, other.timing)
        rows = [verdict(f'images/s, {where} / {self.peer}', ratio, lowest, highest, at_least=getattr(self, mode))]
        if mode == 'train' and ours.peak_bytes and other.peak_bytes:
            title = f'peak memory, {where} / {self.peer}'
            rows.append(verdict(title, ours.peak_bytes / other.peak_bytes, at_most=self.memory))
        return rows


def verdict(
    title: str,
    measured: float,
    lowest: float | None = None,
    highest: float | None = None,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> dict[str, Any]:
    """One row of goals.csv. Five digits, more than any limit has: a miss is never rounded into a pass."""
    goal = '' if at_least is None else f'>= {at_least:g}'
    goal = goal if at_most is None else f'<= {at_most:g}'
    return {
        'ratio': title,
        'measured': round(measured, 5),
        'lowest': None if lowest is None else round(lowest, 5),
        'highest': None if highest is None else round(highest, 5),
        'goal': goal,
        'met': None if not goal else (at_least or -math.inf) <= measured <= (at_most or math.inf),
    }


def print_verdicts(session: bench.Run, rows: Sequence[Mapping[str, Any]]) -> None:
    """Table and goals.csv."""
    if rows:
        write_csv(session.output / 'goals.csv', rows)
        shown = [{**row, 'met': {True: 'met', False: 'MISSED', None: ''}[row['met']]} for row in rows]
        columns = {'ratio': 'ratio', 'measured': 'measured', 'lowest': 'lowest', 'highest': 'highest round'}
        session.console.print(bench.result_table('goals', shown, {**columns, 'goal': 'goal', 'met': ''}))


def model_goals(sections: Mapping[str, Any]) -> list[Goal]:
    """Those of the sections 'models' and 'linear' of goals.yaml."""
    goals = [Goal(**row) for name in ('models', 'linear') for row in sections[name]]
    return [replace(goal, base=tuple(goal.base)) if goal.base else goal for goal in goals]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        Exit code: 0; 1 where a model failed. A goal that is missed is printed as such; it is no error.

    Raises:
        UserError: Arguments that do not fit, before any work is done.
    """
    arguments = _parser().parse_args(argv)
    device, dtype = bench.timing_device(arguments)
    goals = [goal for goal in model_goals(read_goals()) if goal.device == device.type]
    goals = _chosen(goals, 'models', arguments.models, lambda goal: goal.model.removeprefix('hydra_vit_'))
    goals = _chosen(goals, 'execution', arguments.execution, lambda goal: goal.execution)
    modes = arguments.mode or list(bench.MODES)
    pairs = [
        (goal, mode, goal.pair(mode, dtype)) for goal in goals for mode in modes if getattr(goal, mode) is not None
    ]
    if arguments.img_sizes:
        sizes = {(size, size) for size in arguments.img_sizes}
        pairs = [(goal, mode, pair) for goal, mode, pair in pairs if pair[0].img_size in sizes]
        pairs = [row for row in pairs if row[2][1].img_size in sizes]
    if not pairs:
        raise UserError(f'no goal for {device.type} is about these models, sizes, modes and executions: {GOALS}')
    cases = list(dict.fromkeys(case for _, _, pair in pairs for case in pair))
    bench.check_backends(['auto'], device)
    if arguments.profile and device.type != 'cuda':
        raise UserError('--profile needs a CUDA device')
    if device.type == 'cpu' and arguments.threads is None:
        arguments.threads = 2  # what the goals are stated for
    session = bench.start_run(arguments, 'goals', attention=arguments.attention)

    attention = _peer_attention(cases, arguments.attention, session)
    chosen = [replace(case, attention=attention.get(case, 'auto')) for case in cases]
    results = bench.measure_models(chosen, session, arguments)
    by_case = {replace(case, attention='auto'): measured for case, measured in results.items()}
    rows = []
    for goal, mode, pair in pairs:
        ours, other = (by_case[case] for case in pair)
        if ours.timing and other.timing:
            rows += goal.verdicts(mode, ours, other)
    print_verdicts(session, rows)
    if arguments.profile:
        for case in chosen:
            profile_case(case, session)
    session.list_files()
    return 1 if any(measured.failed for measured in results.values()) else 0


def _chosen(goals: list[Goal], option: str, given: list[str] | None, value) -> list[Goal]:
    names = list(dict.fromkeys(value(goal) for goal in goals))
    wanted = [name.removeprefix('hydra_vit_') for name in given or names]
    for name in wanted:
        if name not in names:
            raise UserError(f'--{option}: no goal is about {name!r}; allowed here: {", ".join(names)}')
    return [goal for goal in goals if value(goal) in wanted]


def _peer_attention(cases: Sequence[bench.Case], wanted: str, session: bench.Run) -> dict[bench.Case, str]:
    """The attention backend of every peer: as asked for, or the fastest at its shapes."""
    peers = [case for case in cases if case.backend is None]
    if wanted != 'fastest':
        return dict.fromkeys(peers, wanted)
    chosen: dict[bench.Case, str] = {}
    rows = []
    for case in peers:
        with torch.device('meta'):
            shapes = attention_shapes(create_model(case.model, case.img_size).eval(), torch.empty(1, 3, *case.img_size))
        if not shapes:
            continue
        shape, dtype = (case.batch, *shapes[0][1:]), case.dtype or torch.float32
        chosen[case], times = fastest_attention(shape, dtype, session.device, training=case.mode == 'train')
        sizes = dict(zip('BHLP', shape))
        rows += [{'mode': case.mode, **sizes, 'attention': name, 'median_ms': round(t, 5)} for name, t in times.items()]
    rows = list({tuple(row.values())[:6]: row for row in rows}.values())
    if rows:
        write_csv(session.output / 'attention.csv', rows)
        columns = {key: key for key in ('mode', 'B', 'H', 'L', 'P', 'attention')}
        session.console.print(bench.result_table("the peers' attention alone", rows, {**columns, 'median_ms': 'ms'}))
    return chosen


def _parser() -> Parser:
    parser = Parser(
        prog='python -m benchmarks.goals',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        example='python -m benchmarks.goals --models base --img-sizes 224 --rounds 8 --time-limit 5 --profile',
    )
    add = parser.add_argument
    add('--models', type=comma_list, metavar='LIST', help='only goals about these: hydra_vit_base or base, ...')
    add('--img-sizes', type=positive_list, metavar='LIST', help='only goals whose rows have these sides in px')
    add('--mode', type=bench.choices(bench.MODES), metavar='LIST', help='infer,train (both)')
    add('--execution', type=bench.choices(bench.EXECUTIONS), metavar='LIST', help='eager,compiled,graphs (all)')
    add(
        '--attention',
        choices=('fastest', *ATTENTION),
        default='fastest',
        help="of the peers; auto: PyTorch's choice; fastest (the default): measured at the peers' shapes",
    )
    add('--profile', action='store_true', help='also the time of every kernel in a call of each row (CUDA)')
    bench.add_timing_arguments(parser)
    return parser


if __name__ == '__main__':
    run(main, 'goals')
