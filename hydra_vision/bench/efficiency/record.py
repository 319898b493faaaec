"""What a measurement has left behind so far, and the settings that the same command must have to go on with it."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra_vision.bench.efficiency.points import Point
from hydra_vision.bench.report import write_csv
from hydra_vision.bench.turns import failed
from hydra_vision.environment import environment
from hydra_vision.errors import UserError
from hydra_vision.io import make_output, write_text

__all__ = ['Record']

_IN_ROWS = ('device', 'dtype', 'd_model', 'threads')  # settings that are columns of points.csv


class Record:
    """points.csv in a folder, written anew after every length, and environment.json with the settings of all of it.

    Args:
        folder: Made where it is missing.
        settings: Of this command, JSON values; those of the points that are there must be the same.

    Raises:
        UserError: The folder holds points of other settings, or files that cannot be read; nothing is changed.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, dict(settings)
        self._path = folder / 'points.csv'
        self._check()
        self._points = self._read()
        make_output(folder)
        facts = {**environment(), 'run': self.settings}
        write_text(folder / 'environment.json', json.dumps(facts, indent=2) + '\n')

    def _check(self) -> None:
        path = self.folder / 'environment.json'
        if not path.is_file():
            if self._path.exists():
                raise UserError(f'{self.folder} has points.csv but no environment.json; choose another --output')
            return
        try:
            there = json.loads(path.read_text())['run']
            changed = [key for key in self.settings if there.get(key) != self.settings[key]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f'{path} is not of this command ({error!r}); choose another --output') from error
        if changed:
            old, new = (values.get(changed[0]) for values in (there, self.settings))
            raise UserError(
                f'{self.folder} was measured with {changed[0]} = {old!r}, this command has {new!r}; choose another '
                '--output'
            )

    def _read(self) -> dict[tuple[str, int, str], Point]:
        if not self._path.is_file():
            return {}
        try:
            with self._path.open(newline='') as file:
                points = [Point.from_csv(row) for row in csv.DictReader(file)]
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f'{self._path} cannot be read ({error!r}); choose another --output') from error
        return {(point.mode, point.length, point.mixer): point for point in points}

    @property
    def points(self) -> list[Point]:
        """All of them: forward first, lengths in their order."""
        return sorted(self._points.values(), key=lambda point: (point.mode, point.length))  # a stable sort

    def to_do(self, groups: Sequence[tuple[str, int]], names: Sequence[str]) -> list[tuple[str, int]]:
        """Groups (mode, length) that are not measured, then those in which something failed."""
        new, again = [], []
        for mode, length in groups:
            found = [self._points.get((mode, length, name)) for name in names]
            if None in found:
                new.append((mode, length))
            elif any(failed(point.status) for point in found):
                again.append((mode, length))
        return new + again

    def add(self, points: Sequence[Point]) -> None:
        """Keep the points of one group, on the disk too."""
        self._points.update({(point.mode, point.length, point.mixer): point for point in points})
        columns = {key: self.settings[key] for key in _IN_ROWS}
        write_csv(self._path, [point.csv(columns) for point in self.points])
