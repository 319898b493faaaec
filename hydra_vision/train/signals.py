"""Asks a run to stop: SIGTERM (schedulers, `kill`, torchrun) and SIGUSR1 (SLURM's warning before the time limit)."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """Notes that the run was asked to stop, in place of ending the process; for the length of a block.

    The training loop looks at `received` after every update. Loader processes go on (`outlive_stop`): the process that
    reads from them decides. Outside the main thread, where Python allows no handlers, signals
    keep their effect.

    Attributes:
        received: the signal's number, 0 for none so far.
    """

    NUMBERS = tuple(getattr(signal, name) for name in ('SIGTERM', 'SIGUSR1') if hasattr(signal, name))

    def __init__(self) -> None:
        self.received = 0
        self.process = os.getpid()
        self.before: dict[int, Any] = {}

    def __enter__(self) -> 'StopSignals':
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self.process:
            self.received = number


_OUTLIVE = 60  # seconds that a loader process goes on after SIGTERM; torchrun kills what is left after 30


def outlive_stop(init: Callable[[int], None] | None, worker: int) -> None:
    """Lets a loader process go on after SIGTERM, so that the step in work can end and the run be saved.

    torchrun and SLURM send the signal to loader processes as well, for which PyTorch installs a handler that ends them.
    SIGUSR1 has no effect there by the handler of `StopSignals`, which they inherit.

    Args:
        init: the function that the loader calls otherwise.
        worker: number of the loader process.
    """
    if hasattr(signal, 'alarm'):

        def note(number: int, frame: FrameType | None) -> None:
            if signal.getitimer(signal.ITIMER_REAL)[0] == 0:  # not for ever: a stuck one must not hold up the end
                signal.alarm(_OUTLIVE)

        signal.signal(signal.SIGTERM, note)
    if init is not None:
        init(worker)
