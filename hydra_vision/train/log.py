"""Where the numbers of a run go, beside the terminal."""

from typing import Any, Protocol


class Sink(Protocol):
    """Receives the numbers of a run on the process that writes (rank 0).

    The trainer calls every sink in the order of `Trainer.sinks`. After a resume, `step` and `epoch` go on after the
    checkpoint: what a sink holds of later updates is to be replaced.
    """

    def step(self, updates: int, values: dict[str, float]) -> None:
        """Numbers at one update, every `log.every` updates: 'loss', 'lr', 'grad_norm', ... and per-layer ones."""

    def epoch(self, row: dict[str, Any]) -> None:
        """The row of summary.csv that an epoch ended with."""

    def close(self) -> None:
        """The run ends here, finished or not."""
