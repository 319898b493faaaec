"""Variants that are built, warmed up and timed in turns; one that fails is reported and does not end the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Optional

import torch

from ..errors import first_line
from .memory import allocated, peak_above, release
from .models import OUT_OF_MEMORY
from .timing import Step, Timing, measure

__all__ = ['Outcome', 'failed', 'time_in_turns']

_FAILED = 'failed: '


@dataclass(frozen=True)
class Outcome:
    """What became of one variant: its times and peak memory, or the reason why there are none."""

    timing: Optional[Timing] = None
    peak_bytes: Optional[int] = None
    status: str = 'ok'


def failed(status: str) -> bool:
    """Whether a status says that a variant raised an error; running out of memory is a result."""
    return status.startswith(_FAILED)


def time_in_turns(
    names: Sequence[str],
    build: Callable[[str], Step],
    device: torch.device,
    *,
    rounds: int,
    time_limit: float,
    burst: Optional[float] = None,
) -> dict[str, Outcome]:
    """Time the variants in turns, and take each one's peak memory from a fresh start.

    What does not fit or fails beside the others is tried again alone before it counts as out of memory or failed.

    Args:
        names: Of the variants.
        build: From a name to the call that is timed.
        device: Where it computes.
        rounds: As in ``measure``.
        time_limit: As in ``measure``.
        burst: As in ``measure``.

    Returns:
        The names in their order.
    """
    outcomes: dict[str, Outcome] = {}
    steps: dict[str, Step] = {}

    def prepare(name: str) -> None:
        before = allocated(device)
        try:
            step = build(name)
            step()  # compiles kernels, allocates workspaces
            outcomes[name] = Outcome(peak_bytes=peak_above(step, device, before))
            steps[name] = step
        except Exception as error:  # whatever one of them raises is its own result
            outcomes[name] = Outcome(status=_status(error))

    def run() -> None:
        try:
            timings = measure(steps, device, rounds=rounds, time_limit=time_limit, warmup=1, burst=burst)
        except Exception as error:  # one of them, beside the others
            for name in steps:
                outcomes[name] = Outcome(status=_status(error))
        else:
            for name, timing in timings.items():
                outcomes[name] = replace(outcomes[name], timing=timing)
        steps.clear()
        release(device)

    for name in names:
        prepare(name)
        if name not in steps:
            release(device)
    prepared = list(steps)
    run()
    for name in names:
        outcome = outcomes[name]
        if outcome.timing is None and (name in prepared or not failed(outcome.status)):
            prepare(name)
            run()
    return {name: outcomes[name] for name in names}


def _status(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    return f'{_FAILED}{type(error).__name__}: {first_line(error)}'
