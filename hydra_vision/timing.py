"""Times and peak memory of several variants, measured in interleaved rounds in one process.

A drifting clock or a busy machine hits all variants alike: a round runs every variant once, as a burst of calls long
enough for the clock, and the order rotates from round to round. The result is the distribution over rounds.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from .errors import first_line

__all__ = ['MIN_ROUNDS', 'OUT_OF_MEMORY', 'Measurement', 'Roofline', 'Timing', 'clock_for', 'interleave', 'measure',
           'measure_roofline']  # fmt: skip

MIN_ROUNDS = 3
OUT_OF_MEMORY = 'out of memory'
_FAILED = 'failed: '
# Least duration of a burst in seconds. On CUDA the host runs ahead after the first call: its head start must be
# negligible, or the time to launch one call would count as work of the device.
_BURST = {'cuda': 0.1, 'cpu': 0.05}
_GEMM_SIDE = {'cuda': 8192, 'cpu': 1024}
_COPY_BYTES = {'cuda': 2 << 30, 'cpu': 256 << 20}

Key = TypeVar('Key', bound=Hashable)
Step = Callable[[], object]
Clock = Callable[[Step, int], float]


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one entry per round; every entry is the mean over a burst of ``calls`` calls."""

    seconds: tuple[float, ...]
    calls: int = 1

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def percentile(self, percent: float) -> float:
        """Interpolated linearly between the rounds around it."""
        return float(np.percentile(self.seconds, percent))


@dataclass(frozen=True)
class Measurement:
    """Times and peak memory of one variant, or the reason why there are none.

    Attributes:
        timing: None where the variant ran out of memory or failed.
        peak_bytes: Peak of one call above what was allocated before the variant was built; None without CUDA.
        status: 'ok', 'out of memory', or 'failed: ' and the error.
    """

    timing: Timing | None = None
    peak_bytes: int | None = None
    status: str = 'ok'

    @property
    def failed(self) -> bool:
        """Whether it raised an error; running out of memory is a result."""
        return self.status.startswith(_FAILED)

    @property
    def median(self) -> float | None:
        return None if self.timing is None else self.timing.median

    def columns(self) -> dict[str, Any]:
        """Its part of a CSV row."""
        timing = self.timing
        return {
            'status': self.status,
            'rounds': timing and len(timing.seconds),
            'calls_per_round': timing and timing.calls,
            'median_ms': timing and round(timing.median * 1e3, 5),
            'p10_ms': timing and round(timing.percentile(10) * 1e3, 5),
            'p90_ms': timing and round(timing.percentile(90) * 1e3, 5),
            'peak_memory_gib': None if self.peak_bytes is None else round(self.peak_bytes / 2**30, 7),
        }

    def samples(self) -> list[dict[str, Any]]:
        """One CSV row per round: the raw data behind the median."""
        seconds = () if self.timing is None else self.timing.seconds
        return [{'round': n, 'ms': round(s * 1e3, 5)} for n, s in enumerate(seconds)]


def measure(
    variants: Mapping[Key, Callable[[], Step]],
    device: torch.device,
    *,
    rounds: int = 20,
    time_limit: float = 30.0,
    burst: float | None = None,
    progress: Callable[[Key], object] | None = None,
) -> dict[Key, Measurement]:
    """Build, warm up and time variants in interleaved rounds; one that fails does not end the others.

    All variants are resident together. One that runs out of memory or fails next to the others is tried again alone
    before that becomes its result.

    Args:
        variants: From any key to a function that builds the call to be timed.
        device: Where it computes: cuda or cpu.
        rounds: Most rounds.
        time_limit: Seconds after which no further round starts; ``MIN_ROUNDS`` are run in any case.
        burst: Least duration of a burst of calls in seconds; None for the device's default.
        progress: Called with the key before a variant is built.

    Returns:
        The keys in their order.
    """
    found: dict[Key, Measurement] = {}
    steps: dict[Key, Step] = {}

    def prepare(key: Key) -> None:
        if progress is not None:
            progress(key)
        before = _allocated(device)
        try:
            step = variants[key]()
            for _ in range(2):  # compiles, allocates workspaces, fills the allocator's cache
                step()
            found[key] = Measurement(peak_bytes=_peak_above(before, step, device))
            steps[key] = step
        except Exception as error:  # whatever a variant raises is its result
            found[key] = Measurement(status=_status(error))

    def run() -> None:
        try:
            timings = interleave(steps, device, rounds=rounds, time_limit=time_limit, burst=burst)
        except Exception as error:  # of one variant, next to the others
            found.update(dict.fromkeys(steps, Measurement(status=_status(error))))
        else:
            found.update({key: replace(found[key], timing=timing) for key, timing in timings.items()})
        steps.clear()
        _release(device)

    for key in variants:
        prepare(key)
        if key not in steps:
            _release(device)  # after the error and its traceback are gone, and with them the tensors they hold
    prepared = set(steps)
    run()
    for key in variants:
        if found[key].timing is None and (key in prepared or not found[key].failed) and len(variants) > 1:
            prepare(key)
            run()
    return {key: found[key] for key in variants}


def interleave(
    steps: Mapping[Key, Step],
    device: torch.device,
    *,
    rounds: int = 20,
    time_limit: float = 30.0,
    burst: float | None = None,
    clock: Clock | None = None,
) -> dict[Key, Timing]:
    """Time calls in interleaved rounds. Arguments as in ``measure``; ``clock`` replaces the device's own."""
    clock = clock_for(device) if clock is None else clock
    burst = _BURST[device.type] if burst is None else burst
    keys = list(steps)
    calls = {}
    for key in keys:
        clock(steps[key], 1)
        calls[key] = max(1, math.ceil(burst / max(clock(steps[key], 1), 1e-9)))
    seconds: dict[Key, list[float]] = {key: [] for key in keys}
    start = time.perf_counter()
    for n in range(rounds):
        first = n % max(len(keys), 1)
        for key in keys[first:] + keys[:first]:
            seconds[key].append(clock(steps[key], calls[key]) / calls[key])
        if n + 1 >= MIN_ROUNDS and time.perf_counter() - start > time_limit:
            break
    return {key: Timing(tuple(seconds[key]), calls[key]) for key in keys}


def clock_for(device: torch.device) -> Clock:
    """The clock for work on ``device``: ``clock(step, calls)`` gives the seconds of that many calls.

    Raises:
        ValueError: Neither CUDA nor CPU.
    """
    if device.type not in _BURST:
        raise ValueError(f'device={str(device)!r}: times can be taken on cuda and cpu')
    return _cuda_seconds if device.type == 'cuda' else _wall_seconds


def _wall_seconds(step: Step, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return time.perf_counter() - start


def _cuda_seconds(step: Step, calls: int) -> float:
    """Between two CUDA events; the device is idle before the first one."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000.0


def _allocated(device: torch.device) -> int | None:
    """Bytes of live tensors. A CPU process has no such number: it depends on the allocator and on what ran before."""
    return torch.cuda.memory_allocated(device) if device.type == 'cuda' else None


def _peak_above(baseline: int | None, step: Step, device: torch.device) -> int | None:
    """Weights, inputs, activations and gradients of the variant count, the other variants do not."""
    if baseline is None:
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - baseline


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()


def _status(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    return f'{_FAILED}{type(error).__name__}: {first_line(error)}'


@dataclass(frozen=True)
class Roofline:
    """What a device reaches in one dtype: the rate of a large matrix product, and of a large copy (read + written)."""

    flops_per_second: float
    bytes_per_second: float

    def shares(self, flops: float, size: float, seconds: float | None) -> dict[str, float | None]:
        """Columns of a CSV row: the least times for ``flops`` and for ``size`` bytes, each over the measured one."""
        if seconds is None:
            return {'gemm_floor_share': None, 'memory_floor_share': None}
        return {
            'gemm_floor_share': round(flops / self.flops_per_second / seconds, 4),
            'memory_floor_share': round(size / self.bytes_per_second / seconds, 4),
        }

    def __str__(self) -> str:
        return f'GEMM {self.flops_per_second / 1e12:.3g} TFLOP/s, copy {self.bytes_per_second / 1e12:.3g} TB/s'


def measure_roofline(device: torch.device, dtype: torch.dtype, *, time_limit: float = 2.0) -> Roofline:
    """Measure both rates; the fastest round counts: a floor is what the device can do when nothing disturbs it."""
    side, size = _GEMM_SIDE[device.type], _COPY_BYTES[device.type]
    if device.type == 'cuda':  # a small card: the copy takes an eighth of what is free, twice
        size = min(size, torch.cuda.mem_get_info(device)[0] // 8)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))  # products of zeros run faster
    out = torch.empty_like(a)
    source = torch.zeros(size, device=device, dtype=torch.uint8)
    target = torch.zeros_like(source)  # written once: the copy would fault in untouched pages of the CPU
    steps = {'gemm': lambda: torch.mm(a, b, out=out), 'copy': lambda: target.copy_(source)}
    times = interleave(steps, device, time_limit=time_limit)
    return Roofline(2 * side**3 / min(times['gemm'].seconds), 2 * size / min(times['copy'].seconds))
