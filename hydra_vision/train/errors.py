"""How a run ends before it is done: stopped by a signal, or by the death of a loader process."""

from pathlib import Path

from hydra_vision.errors import DataError, first_line


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
