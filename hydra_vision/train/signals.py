"""Stop signals: SIGTERM (schedulers, `kill`, torchrun) and SIGUSR1 (SLURM's warning before the time limit)."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any


class Stopped(Exception):
    """A signal asked the run to end, and everything is saved. Not an error.

    Args:
        signal: Number of the signal.
        path: The checkpoint to continue from.
        epoch: Epochs done.
        updates: Optimizer steps done.
    """

    def __init__(self, signal: int, path: Path, epoch: int, updates: int):
        super().__init__(signal, path, epoch, updates)
        self.signal, self.path, self.epoch, self.updates = signal, path, epoch, updates


class StopSignals:
    """Record that the run was asked to stop, instead of ending the process; for the length of a block.

    The training loop reads `received` after every optimizer step. Loader processes go on (`survive_stop`): the process
    that reads from them decides. Outside the main thread, where Python allows no handlers, signals keep their effect.

    Attributes:
        received: Number of the signal, 0 for none so far.
    """

    NUMBERS = tuple(getattr(signal, name) for name in ('SIGTERM', 'SIGUSR1') if hasattr(signal, name))

    def __init__(self) -> None:
        self.received = 0
        self.process = os.getpid()
        self.before: dict[int, Any] = {}

    def __enter__(self) -> 'StopSignals':
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._record) for number in self.NUMBERS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self.process:
            self.received = number


_SURVIVE = 60  # seconds that a loader process goes on after SIGTERM; torchrun kills what is left after 30


def survive_stop(worker: int) -> None:
    """Let a loader process go on after SIGTERM, so that the current step can end and the run be saved.

    torchrun and SLURM send the signal to loader processes as well, for which PyTorch installs a handler that ends them.
    SIGUSR1 has no effect there because of the handler of `StopSignals`, which they inherit.

    Args:
        worker: Number of the loader process.
    """
    if not hasattr(signal, 'alarm'):
        return

    def set_alarm(number: int, frame: FrameType | None) -> None:
        if signal.getitimer(signal.ITIMER_REAL)[0] == 0:  # not forever: a stuck one must not hold up the end
            signal.alarm(_SURVIVE)

    signal.signal(signal.SIGTERM, set_alarm)
