"""What a run leaves behind: rows for CSV files, tables for people."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from rich.table import Table

from ..console import make_table
from ..io import write_text
from .goals import Verdict
from .models import Result
from .operators import ATTENTION, OperatorResult
from .peers import PEERS, SCANS
from .timing import Timing

__all__ = [
    'model_ratios',
    'model_row',
    'model_table',
    'operator_row',
    'operator_table',
    'ratio_table',
    'sample_rows',
    'verdict_row',
    'verdict_table',
    'write_csv',
]


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows with the keys of the first as header; None becomes an empty cell. An interrupted write changes nothing."""
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _measured(result: 'Result | OperatorResult') -> dict[str, Any]:
    timing = result.timing
    return {
        'status': result.status,
        'rounds': None if timing is None else len(timing.seconds),
        'calls_per_round': None if timing is None else timing.calls,
        'median_ms': _milliseconds(timing and timing.median),
        'p10_ms': _milliseconds(timing and timing.p10),
        'p90_ms': _milliseconds(timing and timing.p90),
        'peak_memory_gib': None if result.peak_bytes is None else round(result.peak_bytes / 2**30, 4),
        'gemm_floor_share': None if result.gemm_share is None else round(result.gemm_share, 4),
        'memory_floor_share': None if result.memory_share is None else round(result.memory_share, 4),
    }


def _milliseconds(seconds: Optional[float]) -> Optional[float]:
    return None if seconds is None else round(seconds * 1000, 5)


def model_row(result: Result, run: dict[str, Any]) -> dict[str, Any]:
    """One row of results.csv. ``run`` holds what is the same in every row: device, threads."""
    case = result.case
    return {
        **_model_key(result),
        'dtype': str(case.dtype).removeprefix('torch.'),
        **run,
        'images_per_s': None if result.images_per_second is None else round(result.images_per_second, 3),
        **_measured(result),
    }


def _model_key(result: Result) -> dict[str, Any]:
    case = result.case
    return {
        'model': case.model,
        'backend': case.backend,
        'img_size': case.img_size,
        'batch': case.batch,
        'mode': case.mode,
        'execution': case.execution,
    }


def operator_row(result: OperatorResult, run: dict[str, Any]) -> dict[str, Any]:
    """One row of operators.csv."""
    return {**_operator_key(result), 'dtype': str(result.case.dtype).removeprefix('torch.'), **run, **_measured(result)}


def _operator_key(result: OperatorResult) -> dict[str, Any]:
    shape = result.case.shape
    return {
        'operator': result.case.backend,
        'B': shape.batch,
        'L': shape.length,
        'H': shape.attention_heads if result.case.is_attention else shape.heads,
        'P': shape.headdim,
        'N': None if result.case.is_attention else shape.d_state,
        'passes': result.case.passes,
    }


def sample_rows(results: 'Sequence[Result | OperatorResult]') -> list[dict[str, Any]]:
    """Every single round: the raw data behind the medians."""
    rows = []
    for result in results:
        key = _model_key(result) if isinstance(result, Result) else _operator_key(result)
        for n, seconds in enumerate(result.timing.seconds if result.timing else ()):
            rows.append({**key, 'round': n, 'ms': _milliseconds(seconds)})
    return rows


def model_table(results: Sequence[Result]) -> Table:
    """Every case of a run."""
    rows = []
    for result in results:
        case = result.case
        speed = '' if result.images_per_second is None else _digits(result.images_per_second)
        head = [case.mode, str(case.img_size), str(case.batch), case.execution, case.label]
        rows.append([*head, speed, *_measured_cells(result)])
    columns = ['mode', 'px', 'batch', 'run', 'model', 'images/s', *_MEASURED_COLUMNS]
    return make_table('models', columns, rows, right=(1, 2, *range(5, len(columns))))


def operator_table(results: Sequence[OperatorResult]) -> Table:
    """Every case of a run, with its speed relative to the fastest peer, complete and scan alone, and to attention."""
    rows = []
    for result in results:
        rows.append([str(result.case.shape), result.case.passes, result.case.backend, *_measured_cells(result)])
        rows[-1] += [_against(result, results, names) for names in (PEERS, SCANS, (ATTENTION,))]
    others = ['better peer', 'better scan alone', ATTENTION]
    columns = ['shape', 'passes', 'operator', *_MEASURED_COLUMNS, *(f'speed / {other}' for other in others)]
    return make_table('quasiseparable_mix', columns, rows, right=range(3, len(columns)))


def _against(result: OperatorResult, results: Sequence[OperatorResult], names: Sequence[str]) -> str:
    """Speed over that of the fastest of ``names`` in the same place."""
    place = (result.case.shape, result.case.mode)
    others = [r for r in results if (r.case.shape, r.case.mode) == place and r.case.backend in names and r.timing]
    if not others or result.timing is None:
        return ''
    return f'{min(other.timing.median for other in others) / result.timing.median:.2f}'


_MEASURED_COLUMNS = ['median ms', '10 % - 90 %', 'GiB', 'GEMM floor / time', 'memory floor / time']


def _measured_cells(result: 'Result | OperatorResult') -> list[str]:
    timing: Optional[Timing] = result.timing
    if timing is None:
        return [result.status, '', '', '', '']
    return [
        _digits(timing.median * 1000),
        f'{_digits(timing.p10 * 1000)} - {_digits(timing.p90 * 1000)}',
        '' if result.peak_bytes is None else f'{result.peak_bytes / 2**30:.2f}',
        f'{result.gemm_share:.1%}',
        f'{result.memory_share:.1%}',
    ]


def _digits(value: float) -> str:
    """Four digits, never an exponent."""
    return f'{value:.0f}' if value >= 1000 else f'{value:.4g}'


def model_ratios(results: Sequence[Result], peer_of: dict[str, str]) -> list[dict[str, Any]]:
    """Each model against its peer in the same place: speed and memory, where both were measured.

    Args:
        results: A run's.
        peer_of: Model name -> name of its peer.
    """
    rows = []
    for result in results:
        case = result.case
        for other in results:
            same_place = (other.case.img_size, other.case.batch) == (case.img_size, case.batch)
            same_way = (other.case.mode, other.case.compiled) == (case.mode, case.compiled)
            if same_place and same_way and other.case.model == peer_of.get(case.model) and result.timing:
                speed = memory = None
                if other.timing:
                    speed = result.images_per_second / other.images_per_second
                if result.peak_bytes and other.peak_bytes:
                    memory = result.peak_bytes / other.peak_bytes
                rows.append({'result': result, 'peer': other, 'speed': speed, 'memory': memory})
    return rows


def ratio_table(ratios: Sequence[dict[str, Any]]) -> Table:
    """The point of the command."""
    rows = []
    for ratio in ratios:
        case = ratio['result'].case
        rows.append(
            [
                case.mode,
                str(case.img_size),
                str(case.batch),
                case.execution,
                f'{case.label} / {ratio["peer"].case.label}',
                '' if ratio['speed'] is None else f'{ratio["speed"]:.2f}',
                '' if ratio['speed'] is None else f'{1 / ratio["speed"]:.2f}',
                '' if ratio['memory'] is None else f'{ratio["memory"]:.2f}',
            ]
        )
    columns = ['mode', 'px', 'batch', 'run', 'pair', 'images/s', 'time', 'peak memory']
    return make_table('ratios', columns, rows, right=(1, 2, 5, 6, 7))


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """The project's goals that this run can speak to."""
    rows = []
    for verdict in verdicts:
        goal = verdict.goal
        spread = '' if verdict.lowest is None else f'{verdict.lowest:.3f} - {verdict.highest:.3f}'
        value = f'{verdict.value:.3f}'  # three digits more than the limit has: a miss is never rounded into a pass
        mark = {True: 'PASS', False: 'FAIL', None: ''}[verdict.met]
        rows.append([goal.title, value, spread, str(goal), mark])
    return make_table('goals', ['ratio', 'measured', 'by round', 'goal', ''], rows, right=(1, 2))


def verdict_row(verdict: Verdict) -> dict[str, Any]:
    """One row of goals.csv."""
    return {
        'ratio': verdict.goal.title,
        'measured': round(verdict.value, 5),
        'lowest': None if verdict.lowest is None else round(verdict.lowest, 5),
        'highest': None if verdict.highest is None else round(verdict.highest, 5),
        'goal': str(verdict.goal),
        'met': verdict.met,
    }
