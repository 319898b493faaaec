"""Times of several variants, taken in turns in one process, so that a drifting clock or a busy machine hits all alike.

A round runs every variant once, as a burst of calls long enough for the clock; the order moves on by one from round
to round. The result is the distribution over rounds: median, 10th and 90th percentile.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Optional, TypeVar

import torch

from ..console import positive

__all__ = ['MIN_ROUNDS', 'Clock', 'Timing', 'clock_for', 'cuda_seconds', 'measure', 'rounds', 'wall_seconds']

MIN_ROUNDS = 3
# Seconds that a burst lasts at least. On CUDA the host runs ahead after the first call: its head start must be small
# change, or the time to launch one call would count as work of the device.
_BURST = {'cuda': 0.1, 'cpu': 0.05}

Key = TypeVar('Key', bound=Hashable)
Step = Callable[[], object]
Clock = Callable[[Step, int], float]


def rounds(text: str) -> int:
    """A number of rounds that has a spread; an argparse type.

    Raises:
        argparse.ArgumentTypeError: fewer than MIN_ROUNDS.
    """
    value = positive(text)
    if value < MIN_ROUNDS:
        raise argparse.ArgumentTypeError(f'{value} rounds have no spread; at least {MIN_ROUNDS}')
    return value


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one entry a round; every entry is the mean over a burst of ``calls`` calls."""

    seconds: tuple[float, ...]
    calls: int = 1

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def p10(self) -> float:
        return self._percentile(0.1)

    @property
    def p90(self) -> float:
        return self._percentile(0.9)

    def _percentile(self, q: float) -> float:
        ordered = sorted(self.seconds)
        position = q * (len(ordered) - 1)
        below = math.floor(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def wall_seconds(step: Step, calls: int) -> float:
    """Wall-clock seconds of ``calls`` calls of work that is done when the call returns (the CPU)."""
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return time.perf_counter() - start


def cuda_seconds(step: Step, calls: int) -> float:
    """Seconds between two CUDA events around ``calls`` calls; the device is idle before the first event."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000.0


def clock_for(device: torch.device) -> Clock:
    """The clock that is right for work on ``device``.

    Raises:
        ValueError: neither CUDA nor CPU.
    """
    if device.type == 'cuda':
        return cuda_seconds
    if device.type == 'cpu':
        return wall_seconds
    raise ValueError(f'device = {str(device)!r}; times can be taken on cuda and cpu')


def measure(
    variants: Mapping[Key, Step],
    device: torch.device,
    *,
    rounds: int = 20,
    time_limit: float = 30.0,
    warmup: int = 2,
    burst: Optional[float] = None,
    clock: Optional[Clock] = None,
) -> dict[Key, Timing]:
    """Time every variant in turns.

    Args:
        variants: What to time, by any key.
        device: Where it computes.
        rounds: Rounds at most.
        time_limit: Seconds after which no further round starts; ``MIN_ROUNDS`` are run in any case.
        warmup: Calls of each variant before the first that counts.
        burst: Seconds that a burst lasts at least; None for the device's own.
        clock: Instead of the device's own.

    Returns:
        The keys in their order, each with its timing.
    """
    clock = clock_for(device) if clock is None else clock
    burst = _BURST[device.type] if burst is None else burst
    keys = list(variants)
    calls = {}
    for key in keys:
        clock(variants[key], warmup)
        calls[key] = max(1, math.ceil(burst / max(clock(variants[key], 1), 1e-9)))
    seconds: dict[Key, list[float]] = {key: [] for key in keys}
    start = time.perf_counter()
    for n in range(rounds):
        first = n % max(len(keys), 1)
        for key in keys[first:] + keys[:first]:
            seconds[key].append(clock(variants[key], calls[key]) / calls[key])
        if n + 1 >= MIN_ROUNDS and time.perf_counter() - start > time_limit:
            break
    return {key: Timing(tuple(seconds[key]), calls[key]) for key in keys}
