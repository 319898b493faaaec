"""Errors that end a run with a message for the user instead of a traceback."""

from pathlib import Path


class TrainError(Exception):
    """Anything the user can mend: its text is the whole message."""

    exit_code = 1
    shared = False  # whether every process of the run ends with it: then one of them tells it

    def of_all(self) -> 'TrainError':
        """The error, marked as one that every process ends with."""
        self.shared = True
        return self


class ConfigError(TrainError):
    """A recipe, an override or a flag that is not valid. Raised before any work is done."""

    exit_code = 2


class DataError(TrainError):
    """A data set that is missing, incomplete or unreadable."""


class CheckpointError(TrainError):
    """A checkpoint that could not be written or read."""


class NonFiniteError(TrainError):
    """The loss, or a weight, became NaN or infinite."""


class Stopped(Exception):
    """A signal asked the run to end, and everything is saved: no error.

    Args:
        signal: its number.
        path: the checkpoint to go on from.
        epoch: epochs done.
        updates: optimizer steps done.
    """

    def __init__(self, signal: int, path: Path, epoch: int, updates: int):
        super().__init__(signal, path, epoch, updates)
        self.signal, self.path, self.epoch, self.updates = signal, path, epoch, updates


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def loader_death(error: RuntimeError) -> DataError | None:
    """What the death of a loader process means for the user; None for another error.

    PyTorch raises it wherever the main process happens to be.
    """
    text = first_line(error)
    if 'DataLoader worker' not in text:
        return None
    return DataError(
        f'a loader process died ({text}): often too little memory (fewer --workers need less) or shared memory (in a '
        f'container: a larger --shm-size); the same command with --resume auto continues from the last checkpoint'
    )
