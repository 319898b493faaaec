"""Efficiency length as the Comprehensive Attention Benchmark defines it: ``efficiency_length --protocol cab``.

Noncausal self-attention of width 512, 8 heads, batch 4, float32, L = 256, 512, ..., 8192; forward in train mode with
autograd on, 100 calls; time is the mean of the calls between the 25th and the 75th percentile, memory the peak above
what was allocated before the module was built. Unfused softmax attention is fitted by a L^2 + b L + c through all
lengths, the other by d L + e (its time without the first length); the larger root of their difference is the length.

Two departures: here every call is synchronised and the peak is reset for every point; their script does neither. Their
attentions have dropout 0.3, which the mixers here do not.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from hydra_vision.errors import first_line

from .record import Record, failed, number

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
WIDTH, BATCH, CALLS = 512, 4, 100
QUANTITIES = ('ms', 'memory_mib')
# Zhang et al., ICML 2023: (time, memory) in tokens, by their implementations on their hardware
PUBLISHED = {
    'ABC': (1877, 70),
    'Performer': (2361, 37),
    'cosFormer': (2539, 164),
    'LARA': (2541, 68),
    'Nystromformer': (3045, 94),
    'ProbSparse': (3450, 281),
    'local attention': (4195, 1169),
    'LongShort': (5652, 342),
    'S4D': (6011, 949),
}


def measure_point(build: Callable[[], nn.Module], length: int, device: torch.device, calls: int) -> dict[str, Any]:
    """Columns status, ms and memory_mib (None without CUDA) of one module at one length."""
    cuda = device.type == 'cuda'
    gc.collect()
    before = torch.cuda.memory_stats(device).get('active_bytes.all.current', 0) if cuda else 0
    seconds = []
    try:
        mixer = build().train()
        u = torch.randn(BATCH, length, WIDTH, device=device)
        for _ in range(calls):
            if cuda:
                if not seconds:
                    torch.cuda.reset_peak_memory_stats(device)
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            y = mixer(u)
            if cuda:
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
            del y
    except torch.OutOfMemoryError:
        return {'status': 'out of memory', 'ms': None, 'memory_mib': None}
    except Exception as error:  # the others are still measured
        return {'status': f'failed: {first_line(error)}', 'ms': None, 'memory_mib': None}
    low, high = np.percentile(seconds, [25, 75])
    peak = torch.cuda.memory_stats(device)['active_bytes.all.peak'] - before if cuda else None
    return {
        'status': 'ok',
        'ms': round(statistics.fmean(s for s in seconds if low <= s <= high) * 1e3, 5),
        'memory_mib': None if peak is None else round(peak / 2**20, 3),
    }


def efficiency_length(
    mixer: Mapping[int, float], attention: Mapping[int, float], without_first: bool = False
) -> float | None:
    """Tokens at which the fitted line of a mixer crosses the fitted parabola of attention for the last time.

    0 where the line is below at every length; None where it is above, or with fewer than three lengths of attention or
    two of the mixer.
    """
    lengths = sorted(mixer)[1:] if without_first else sorted(mixer)
    if len(attention) < 3 or len(lengths) < 2:
        return None
    line = np.polyfit(lengths, [mixer[n] for n in lengths], 1)
    parabola = np.polyfit(*zip(*sorted(attention.items())), 2)
    gap = np.polysub(parabola, line)
    where = [float(root.real) for root in np.roots(gap) if root.imag == 0 and root.real > 0]
    return max(where, default=0.0 if np.polyval(gap, lengths[-1]) > 0 else None)


def lengths_of(points: Sequence[Mapping[str, Any]], name: str, attention: str) -> list[float | None]:
    """Efficiency lengths of a mixer in time and in memory."""

    def curve(of: str, quantity: str) -> dict[int, float]:
        rows = (p for p in points if p['mixer'] == of)
        return {int(p['L']): value for p in rows if (value := number(p, quantity)) is not None}

    return [efficiency_length(curve(name, q), curve(attention, q), without_first=q == 'ms') for q in QUANTITIES]


def measure(
    record: Record,
    names: Sequence[str],
    lengths: Sequence[int],
    device: torch.device,
    calls: int,
    build: Callable[[str, int], nn.Module],
    columns: Mapping[str, Any],
) -> None:
    """Adds what the record has not; ``names`` with attention, ``columns`` are those of every row."""
    for length in lengths:
        for name in names:
            found = record.get(length, name)
            if found is None or failed(found):
                point = measure_point(lambda name=name, length=length: build(name, length), length, device, calls)
                record.add([{'mixer': name, 'L': length, **point, **columns}])


def table_lines(points: Sequence[Mapping[str, Any]], names: Sequence[str], attention: str) -> list[list[str]]:
    """The mixers measured here, then what is published."""

    def text(length: float | None) -> str:
        if length is None:
            return ''
        return f'{length:.0f}' if length else 'always'

    lines = [[name, 'here', *map(text, lengths_of(points, name, attention))] for name in names]
    return lines + [[name, 'published', *map(str, both)] for name, both in PUBLISHED.items()]
