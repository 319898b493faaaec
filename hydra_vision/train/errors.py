"""Errors that end a run with a message for the user instead of a traceback."""


class TrainError(Exception):
    """Anything the user can mend: its text is the whole message."""

    exit_code = 1


class ConfigError(TrainError):
    """A recipe, an override or a flag that is not valid. Raised before any work is done."""

    exit_code = 2


class DataError(TrainError):
    """A data set that is missing, incomplete or unreadable."""


class CheckpointError(TrainError):
    """A checkpoint that could not be written or read."""


class NonFiniteError(TrainError):
    """The loss, or a weight, became NaN or infinite."""


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def loader_death(error: RuntimeError) -> DataError | None:
    """What the death of a loader process means for the user; None for another error.

    PyTorch raises it wherever the main process happens to be.
    """
    text = first_line(error)
    if "DataLoader worker" not in text:
        return None
    return DataError(
        f"a loader process died ({text}): often too little memory (fewer --workers need less) or shared memory (in a "
        f"container: a larger --shm-size); the same command with --resume auto continues from the last checkpoint"
    )
