"""Errors that end a command with one line for its user, and what goes into such a line.

Every class is a `UserError`: its text is the whole message, without a traceback. Exit code 2 says that the arguments or
the recipe are wrong, 1 that what they name failed: data, a checkpoint, the disk, the loss.
"""

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType

__all__ = [
    'CheckpointError',
    'ConfigError',
    'DataError',
    'FeatureError',
    'MissingExtraError',
    'NonFiniteError',
    'TrainError',
    'UserError',
    'WriteError',
    'first_line',
    'nearest',
    'require',
    'user_text',
]


class UserError(Exception):
    """Anything the user can mend: its text is the whole message."""

    exit_code = 2
    shared = False  # whether every process of a run ends with it: then one of them reports it

    def of_all(self) -> 'UserError':
        """The error, marked as one that every process ends with."""
        self.shared = True
        return self


class MissingExtraError(UserError, ImportError):
    """An optional package that is not installed, or does not work."""


class FeatureError(UserError, ValueError):
    """Features, or a model, an argument or a file for them, that do not fit."""


class TrainError(UserError):
    """Data, a checkpoint, the disk or the loss failed."""

    exit_code = 1


class ConfigError(TrainError):
    """A recipe, an override or a flag that is not valid. Raised before any work is done."""

    exit_code = 2


class DataError(TrainError):
    """A data set that is missing, incomplete or unreadable."""


class CheckpointError(TrainError):
    """A checkpoint that could not be written or read."""


class WriteError(TrainError):
    """A file that could not be written: a full or read-only disk, no permission."""


class NonFiniteError(TrainError):
    """The loss, or a weight, became NaN or infinite."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's text; the name of its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def user_text(error: UserError) -> str:
    """The message of an error; one that comes out of a loader process carries its traceback in front."""
    text = str(error)
    return text.rstrip().splitlines()[-1].partition('Error: ')[2] if 'Original Traceback' in text else text


def nearest(name: str, valid: Iterable[str]) -> str:
    """'; the nearest valid name is ...' for an error message, or '' where nothing is near.

    A typing error in the whole name comes first; of dotted names, the last part may be enough ('lr', 'optim.lr').
    """
    names = list(valid)
    leaves = {choice.rpartition('.')[2]: choice for choice in reversed(names)}
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
    close = close or [leaves[leaf] for leaf in difflib.get_close_matches(name.rpartition('.')[2], leaves, n=1)]
    close = close or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f'; the nearest valid name is {close[0]!r}' if close else ''


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: Its import name.
        extra: The extra of this package that installs it.

    Raises:
        MissingExtraError: It is not installed, or one of its own dependencies is not.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        text = f"{module} cannot be imported ({error}): pip install 'hydra-vision[{extra}]'"
        raise MissingExtraError(text) from error
