"""Tables for people."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

__all__ = ['make_table', 'stdout_console']


def stdout_console() -> Console:
    """A console on today's stdout, without markup: file names may hold brackets."""
    # A pipe or a file has no width of its own: rich would cut the tables at 80 columns.
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)


def make_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[int] = (),
) -> Table:
    """A table of strings; ``right`` are the indices of the columns that hold numbers."""
    table = Table(title=title, title_justify='left')
    for i, column in enumerate(columns):
        table.add_column(column, justify='right' if i in right else 'left', overflow='fold')
    for row in rows:
        table.add_row(*row)
    return table
