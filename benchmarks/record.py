"""Results that a later call of the same command continues: a CSV file and the settings of all its rows."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra_vision.environment import environment
from hydra_vision.errors import UserError
from hydra_vision.io import make_output, read_csv, write_csv, write_text


class Record:
    """Rows of a CSV file, written anew whenever some are added, next to environment.json with their settings.

    Args:
        path: Of the CSV file; its folder is made where it is missing.
        key: Columns that tell one row from another.
        settings: Of this command, JSON values; those of the rows that are there must be the same.
        overwrite: Begin anew, whatever is there.

    Raises:
        UserError: The folder holds rows of other settings, or files that cannot be read; nothing is changed.
    """

    def __init__(self, path: Path, key: Sequence[str], settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path, self._key = path, tuple(key)
        facts = path.with_name('environment.json')
        if overwrite:
            path.unlink(missing_ok=True)
        elif facts.is_file():
            try:
                there = json.loads(facts.read_text())['run']
                changed = [name for name in settings if there.get(name) != settings[name]]
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f'{facts} is not of this command ({error!r}); choose another --output') from error
            if changed:
                name = changed[0]
                raise UserError(
                    f'{path.parent} was measured with {name}={there.get(name)!r}, this command has {settings[name]!r}; '
                    'choose another --output, or --overwrite'
                )
        elif path.exists():
            raise UserError(f'{path.parent} has {path.name} but no environment.json; choose another --output')
        try:
            self._rows = {self._of(row): row for row in read_csv(path)} if path.is_file() else {}
        except KeyError as error:
            raise UserError(f'{path} cannot be read: no column {error}; choose another --output') from error
        make_output(path.parent)
        write_text(facts, json.dumps({**environment(), 'run': dict(settings)}, indent=2) + '\n')

    def _of(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in self._key)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All of them, as text where they were read; a missing value is '' or None."""
        return list(self._rows.values())

    def get(self, *key: Any) -> dict[str, Any] | None:
        """The row of a key, or None."""
        return self._rows.get(tuple(map(str, key)))

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep rows, on the disk too; each replaces the one of its key."""
        self._rows.update({self._of(row): dict(row) for row in rows})
        columns = dict.fromkeys(name for row in self._rows.values() for name in row)
        write_csv(self.path, self.rows, list(columns))


def failed(row: Mapping[str, Any]) -> bool:
    """Whether what a row is about raised an error; running out of memory is a result."""
    return row['status'].startswith('failed')


def number(row: Mapping[str, Any], name: str) -> float | None:
    """A column as a number; None where the cell is empty."""
    return None if row.get(name) in (None, '') else float(row[name])
