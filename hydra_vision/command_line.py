"""What every subcommand shares: its parser, its errors, the nearest valid name."""

import argparse
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

__all__ = [
    'Parser',
    'UserError',
    'check_model_name',
    'comma_list',
    'make_output',
    'nearest',
    'positive',
    'positive_list',
]


class UserError(Exception):
    """Anything the user can mend: its text is the whole message, the exit code is 2."""


class Parser(argparse.ArgumentParser):
    """argparse with whole option names only and one line an error, without the usage text before it."""

    def __init__(self, **kwargs) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: error: {message}\n')


def comma_list(text: str) -> list[str]:
    """'a,b' -> ['a', 'b']; an argparse type.

    Raises:
        argparse.ArgumentTypeError: an empty element.
    """
    parts = [part.strip() for part in text.split(',')]
    if not all(parts):
        raise argparse.ArgumentTypeError(f'{text!r} has an empty element; write a,b,c')
    return parts


def positive(text: str) -> int:
    """'3' -> 3; an argparse type.

    Raises:
        argparse.ArgumentTypeError: anything but a positive integer.
    """
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a positive integer')
    return value


def positive_list(text: str) -> list[int]:
    """'64,128' -> [64, 128]; an argparse type."""
    return [positive(part) for part in comma_list(text)]


def nearest(name: str, valid: Iterable[str]) -> str:
    """'; the nearest valid name is ...' for an error message, or '' where nothing is near.

    A slip of the finger in the whole name comes first; of dotted names, the last part may be enough ('lr', 'optim.lr').
    """
    names = list(valid)
    leaves = {choice.rpartition('.')[2]: choice for choice in reversed(names)}
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
    close = close or [leaves[leaf] for leaf in difflib.get_close_matches(name.rpartition('.')[2], leaves, n=1)]
    close = close or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f'; the nearest valid name is {close[0]!r}' if close else ''


def make_output(folder: Path) -> Path:
    """The folder that --output names, made where it is missing.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--output {str(folder)!r}: {error.strerror}') from error
    return folder


def check_model_name(name: str) -> None:
    """Let a name pass that ``timm.create_model`` knows.

    Raises:
        UserError: names the nearest valid model.
    """
    import timm

    architecture = name.partition('.')[0]
    if not timm.is_model(architecture):
        raise UserError(f'unknown model {name!r}{nearest(architecture, timm.list_models())}')
