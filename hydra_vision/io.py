"""Files: written whole or not at all, tables as CSV, folders that can be written to."""

import contextlib
import csv
import io
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError, WriteError, first_line

__all__ = [
    'check_output',
    'make_output',
    'read_csv',
    'to_path',
    'why_unwritable',
    'write_atomically',
    'write_csv',
    'write_text',
]


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Call `write` on a temporary file in the same folder, flush it to the disk and rename it to `path`.

    Whatever goes wrong before the rename (full disk, kill, power), the file that was there before is untouched.

    Args:
        path: Of the file.
        write: Writes the whole content to the binary file that it is given.

    Raises:
        WriteError: The file could not be written.
    """
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns some write errors into RuntimeError
        _remove(temporary)
        kept = f'; the previous {path.name} is intact' if path.exists() else ''
        raise WriteError(f'could not write {path}: {first_line(error)}{kept}') from error
    except BaseException:  # interrupted by the user: leave no half file behind
        _remove(temporary)
        raise
    _sync_folder(path.parent)


def _remove(path: Path) -> None:
    with contextlib.suppress(
        OSError
    ):  # where the folder itself became unwritable, the first error is the one to report
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Flush the names of a folder to the disk, where the system can: a rename survives a power cut only then."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically, as UTF-8.

    Raises:
        WriteError: The file could not be written.
    """
    write_atomically(path, lambda file: file.write(text.encode()))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Write a table atomically; None becomes an empty cell.

    Args:
        path: Of the file.
        rows: One mapping per row; a missing key is an empty cell.
        columns: Names of the columns; None: the keys of the first row.

    Raises:
        ValueError: A row has a key that is no column.
        WriteError: The file could not be written.
    """
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, list(rows[0]) if columns is None else columns, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header.

    Raises:
        UserError: The file cannot be read, or a row has not as many cells as the header.
    """
    try:
        with open(path, newline='', encoding='utf-8') as file:
            rows = list(csv.DictReader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'{path} cannot be read: {first_line(error)}') from error
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise UserError(f'{path} is damaged: row {number} has not as many cells as the header')
    return rows


def to_path(text: str | os.PathLike, name: str = 'path') -> Path:
    """A path with `~` expanded.

    The empty string, which an unset shell variable leaves, is no path: `Path('')` would be the current folder.

    Args:
        text: Of the user.
        name: Of the argument, for the error.

    Raises:
        UserError: The text is empty, or holds a NUL character.
    """
    if not os.fspath(text):
        raise UserError(f"{name}='' is empty; write . for the current folder")
    if '\0' in os.fspath(text):
        raise UserError(f'{name}={os.fspath(text)!r} holds a NUL character')
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~nobody
        raise UserError(f'{name}={os.fspath(text)!r}: {first_line(error)}') from error


def check_output(
    path: str | os.PathLike, suffixes: Sequence[str], *, overwrite: bool = False, name: str = 'output'
) -> Path:
    """A path that a file can be written to.

    Args:
        path: Of the user.
        suffixes: That its name may end in.
        overwrite: Whether a file that is there may be replaced.
        name: Of the argument, for errors.

    Raises:
        UserError: The empty string, another suffix, a folder that cannot be written to, a file that is there already.
    """
    path = to_path(path, name)
    if path.suffix.lower() not in suffixes:
        raise UserError(f'{name}={str(path)!r}: its name must end in {", ".join(suffixes)}')
    reason = 'it is a folder' if path.is_dir() else why_unwritable(path.parent)
    if reason:
        raise UserError(f'{name}={str(path)!r} cannot be written: {reason}')
    if path.exists() and not overwrite:
        raise UserError(f'{name}={str(path)!r} exists already; --overwrite (overwrite=True) replaces it')
    return path


def why_unwritable(folder: Path) -> str:
    """Why no file can be made in a folder, found by making one that has no name; '' where it can."""
    if not folder.is_dir():
        return f'there is no folder {str(folder)!r}'
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ''
    except OSError as error:  # no permission, a read-only disk, a full one
        return f'no file can be made in {str(folder)!r} ({error.strerror})'


def make_output(folder: Path) -> Path:
    """The folder that --output names, made where it is missing.

    Raises:
        UserError: It cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--output {str(folder)!r}: {error.strerror}') from error
    if why := why_unwritable(folder):
        raise UserError(f'--output {str(folder)!r}: {why}')
    return folder
