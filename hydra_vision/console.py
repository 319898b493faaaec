"""What commands share: the argument parser and its types, tables, progress."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .errors import UserError, nearest
from .io import to_path

__all__ = [
    'Meter',
    'Parser',
    'check_model_name',
    'comma_list',
    'image_size',
    'image_sizes',
    'integer_list',
    'make_table',
    'markdown_table',
    'non_empty',
    'non_negative',
    'number_list',
    'path',
    'positive',
    'positive_list',
    'progress',
    'stdout_console',
]

_LARGEST_SIDE = 32768  # pixels: a square of more would not fit into any memory, and PyTorch's own error is a traceback
_LINE_SECONDS = 30.0  # between two lines of progress where there is no terminal


class Parser(argparse.ArgumentParser):
    """argparse with whole option names only and one line per error, without the usage text before it.

    Args:
        example: A command line that works, shown at the end of --help.
        **kwargs: As for argparse.
    """

    def __init__(self, *, example: str | None = None, **kwargs) -> None:
        if example is not None:
            kwargs['epilog'] = '\n\n'.join(text for text in (kwargs.get('epilog'), f'example:\n  {example}') if text)
            kwargs.setdefault('formatter_class', argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: error: {message}\n')


def non_empty(text: str) -> str:
    """An argparse type: any text but the empty one, which an unset shell variable leaves.

    Raises:
        argparse.ArgumentTypeError: The empty text.
    """
    if not text:
        raise argparse.ArgumentTypeError('it is empty')
    return text


def path(text: str) -> Path:
    """An argparse type: a path, `~` expanded.

    Raises:
        argparse.ArgumentTypeError: The empty text, which would mean the current folder.
    """
    try:
        return to_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def comma_list(text: str) -> list[str]:
    """'a,b' -> ['a', 'b']; an argparse type.

    Raises:
        argparse.ArgumentTypeError: An empty element.
    """
    parts = [part.strip() for part in text.split(',')]
    if not all(parts):
        raise argparse.ArgumentTypeError(f'{text!r} has an empty element; write a,b,c')
    return parts


def _whole(text: str, lowest: int, kind: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = lowest - 1
    if value < lowest:
        raise argparse.ArgumentTypeError(f'{text!r} is not a {kind} integer')
    return value


def positive(text: str) -> int:
    """'3' -> 3; an argparse type.

    Raises:
        argparse.ArgumentTypeError: Anything but a positive integer.
    """
    return _whole(text, 1, 'positive')


def non_negative(text: str) -> int:
    """'0' -> 0; an argparse type.

    Raises:
        argparse.ArgumentTypeError: Anything but an integer of 0 or more.
    """
    return _whole(text, 0, 'non-negative')


def positive_list(text: str) -> list[int]:
    """'64,128' -> [64, 128]; an argparse type."""
    return [positive(part) for part in comma_list(text)]


def integer_list(text: str) -> list[int]:
    """'3,-1' -> [3, -1]; an argparse type."""
    try:
        return [int(part) for part in comma_list(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r}: write whole numbers with commas between them') from None


def number_list(text: str) -> list[float]:
    """'0.1,1' -> [0.1, 1.0]; an argparse type."""
    try:
        return [float(part) for part in comma_list(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r}: write numbers with commas between them') from None


def image_size(text: str) -> tuple[int, int]:
    """'224' -> (224, 224), '224x448' -> (224, 448), height first; an argparse type.

    Raises:
        argparse.ArgumentTypeError: Anything else, or a side that no image has.
    """
    sides = text.lower().split('x')
    try:
        height, width = (int(side) for side in (sides if len(sides) == 2 else sides * 2))
    except ValueError:
        height = width = 0
    if not (0 < height <= _LARGEST_SIDE and 0 < width <= _LARGEST_SIDE):
        raise argparse.ArgumentTypeError(f'{text!r} is not a size in pixels (1 to {_LARGEST_SIDE}): write N or HxW')
    return height, width


def image_sizes(text: str) -> list[tuple[int, int]]:
    """'224,512x256' -> [(224, 224), (512, 256)]; an argparse type."""
    return [image_size(part) for part in comma_list(text)]


def check_model_name(name: str) -> None:
    """Let a name pass that `timm.create_model` knows.

    Raises:
        UserError: Another name; names the nearest valid model.
    """
    import timm

    architecture = name.partition('.')[0]
    if not timm.is_model(architecture):
        raise UserError(f'unknown model {name!r}{nearest(architecture, timm.list_models())}')


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise


def stdout_console() -> Console:
    """A console on today's stdout, without markup: file names may hold brackets."""
    # A pipe or a file has no width of its own: rich would cut the tables at 80 columns.
    return _Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)


def make_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[int] = (),
) -> Table:
    """A table of strings; `right` are the indices of the columns that hold numbers."""
    table = Table(title=title, title_justify='left')
    for i, column in enumerate(columns):
        table.add_column(column, justify='right' if i in right else 'left', overflow='fold')
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as Markdown, a newline at the end."""
    lines = [columns, ['---'] * len(columns), *rows]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


class Meter:
    """Counts items of a task: a bar on a terminal, else a line on stderr every half minute."""

    def __init__(self, bar: Progress, text: str, unit: str) -> None:
        self.bar, self.text, self.unit = bar, text, unit
        self.task = bar.add_task(text, total=None, speed='')
        self.first: tuple[int, float] | None = None  # what an earlier process did does not count
        self.last: tuple[int, float] = (0, 0.0)
        self.printed = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` items are done."""
        self.last = (done, time.perf_counter())
        self.first = self.first or self.last
        self.bar.update(self.task, completed=done, total=total, speed=self.speed())
        if self.bar.disable and self.last[1] - self.printed > _LINE_SECONDS:
            self.printed = self.last[1]
            print(f'{self.text}: {done}/{total}, {self.speed()}', file=sys.stderr, flush=True)

    def speed(self) -> str:
        """Items per second since the first call."""
        items = self.last[0] - self.first[0] if self.first else 0
        seconds = self.last[1] - self.first[1] if self.first else 0.0
        return f'{items / seconds:.0f} {self.unit}/s' if items and seconds else 'nothing was left to do'


@contextmanager
def progress(text: str, unit: str = 'images') -> Iterator[Meter]:
    """Progress of a block on stderr.

    Args:
        text: What is done.
        unit: What is counted.

    Yields:
        A function of (done, total), which also knows the speed.
    """
    columns = [
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn('{task.fields[speed]}'),
        TimeRemainingColumn(),
    ]
    console = Console(stderr=True, highlight=False, markup=False)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield Meter(bar, text, unit)
