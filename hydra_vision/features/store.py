"""The files of an extraction while it runs: rows first, then the lines that speak of them."""

import csv
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Optional

import numpy as np
import timm
import torch
from filelock import FileLock, Timeout

from ..errors import TrainError
from ..io import write_text
from ..version import __version__
from .errors import FeatureError
from .files import LOG_FIELDS, brief_values, card_path, header, log_path, read_card, read_log, to_parquet
from .sources import Images

__all__ = ['RowStore', 'only_writer']

_TEXT = dict(newline='', encoding='utf-8', errors='surrogateescape')
_NAMES = {'weights', 'images'}  # the same by another path; fingerprint, sample and lines say whether they are
_COMMIT_SECONDS = 1.0  # at most this much work is lost in a kill
_LOCK_SECONDS = 8.0  # loader processes hold the lock of a killed run for up to five seconds


@contextmanager
def only_writer(target: Path) -> Iterator[None]:
    """Keep other processes from writing the same files; a kill ends it.

    Raises:
        FeatureError: Another process writes them.
    """
    path = target.with_name(target.name + '.lock')
    lock = FileLock(path)
    try:
        lock.acquire(timeout=_LOCK_SECONDS)
    except Timeout:
        raise FeatureError(f'another process is writing {target}: wait for it, or choose another file') from None
    try:
        yield
    finally:
        with suppress(OSError):  # Windows does not remove an open file
            path.unlink()
        lock.release()


class RowStore:
    """The files of one extraction. Whatever is in the CSV is in ``out.partial``, in the same order."""

    def __init__(self, target: Path, source: Images, card: dict[str, Any]) -> None:
        self.target, self.source, self.card = target, source, card
        self.partial = target.with_name(target.name + '.partial')
        self.row_bytes = int(np.prod(card['shape'])) * np.dtype(card['dtype']).itemsize
        self.done = self.rows = 0
        self.skipped: list[str] = []
        self.pending: list[tuple[Any, ...]] = []

    def open(self, overwrite: bool) -> bool:
        """Compare with what is there and get ready; False where the file is finished already."""
        before = self._card_before()
        lines = [] if before is None else read_log(self.target)
        conflict = self._conflict(before, lines)
        if conflict and not overwrite:
            raise FeatureError(f'{conflict}: choose another file, or overwrite it')
        if conflict or before is None:
            for path in (self.target, self.partial, log_path(self.target), card_path(self.target)):
                path.unlink(missing_ok=True)
            self.partial.write_bytes(self._header(len(self.source)))
            self._write_log([])
            self._write_card({})
            return True
        if self.target.exists():
            return False
        self._resume(lines)
        return True

    def __enter__(self) -> 'RowStore':
        self.file = open(self.partial, 'ab')
        self.log = open(log_path(self.target), 'a', **_TEXT)
        self.committed = time.monotonic()
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self._commit()
        finally:
            self.file.close()
            self.log.close()

    def add(self, features: np.ndarray, errors: list[str]) -> None:
        """Take the rows of the next images; ``errors`` has an entry for each, '' for those that have a row."""
        self.file.write(np.ascontiguousarray(features).data)
        for error in errors:
            path = self.source.paths[self.done]
            label = '' if self.source.classes is None else self.source.classes[self.done]
            self.pending.append(('' if error else self.rows, path, label, error))
            if error:
                self.skipped.append(f'{path}: {error}')
            self.rows += not error
            self.done += 1
        if time.monotonic() - self.committed > _COMMIT_SECONDS:
            self._commit()

    def finish(self) -> None:
        """Put in the number of rows, describe, rename: from then on the file is there, and complete."""
        if not self.rows:
            raise FeatureError(f'not one of {len(self.source)} images could be read: {self.skipped[0]}')
        ready = self.partial
        if self.target.suffix == '.parquet':
            ready = self.target.with_name(self.target.name + '.tmp')
            lines = [line for line in read_log(self.target) if line['row'] != '']
            to_parquet(self.partial, ready, lines, self.card)
        with open(ready, 'r+b') as file:
            file.write(self._header(self.rows))
            file.flush()
            os.fsync(file.fileno())
        self._write_card({'rows': self.rows, 'skipped': self.skipped, 'versions': _versions()})
        os.replace(ready, self.target)
        self.partial.unlink(missing_ok=True)

    def _commit(self) -> None:
        """Rows to the disk first, then the lines that speak of them."""
        self.file.flush()
        os.fsync(self.file.fileno())
        csv.writer(self.log, lineterminator='\n').writerows(self.pending)
        self.log.flush()
        self.pending = []
        self.committed = time.monotonic()

    def _resume(self, lines: list[dict[str, str]]) -> None:
        """Cut both files back to what they agree on."""
        start = len(self._header(0))
        whole = max(0, self.partial.stat().st_size - start) // self.row_bytes if self.partial.exists() else 0
        # The first line whose row is missing, not the last ones: a line of an unreadable image may follow it.
        lost = (i for i, line in enumerate(lines) if line['row'] != '' and int(line['row']) >= whole)
        del lines[next(lost, len(lines)) :]
        self.done, self.rows = len(lines), sum(line['row'] != '' for line in lines)
        self.skipped = [f'{line["path"]}: {line["error"]}' for line in lines if line['row'] == '']
        with open(self.partial, 'r+b' if self.partial.exists() else 'w+b') as file:
            file.write(self._header(len(self.source)))
            file.truncate(start + self.rows * self.row_bytes)
        self._write_log(lines)

    def _write_log(self, lines: list[dict[str, str]]) -> None:
        with open(log_path(self.target), 'w', **_TEXT) as log:
            writer = csv.DictWriter(log, LOG_FIELDS, lineterminator='\n')
            writer.writeheader()
            writer.writerows(lines)

    def _card_before(self) -> Optional[dict[str, Any]]:
        if not (card_path(self.target).is_file() and log_path(self.target).is_file()):
            return None
        return read_card(self.target)

    def _conflict(self, before: Optional[dict[str, Any]], lines: list[dict[str, str]]) -> str:
        """Why what is there cannot be continued; '' where it can, or where nothing is there."""
        if before is None:
            return f'{self.target} exists and is not of this extraction' if self.target.exists() else ''
        differs = {key for key in self.card if before.get(key) != self.card[key]} - _NAMES
        if 'fingerprint' in differs:
            differs = {'fingerprint'} if before['model'] == self.card['model'] else {'model'}
        if differs == {'sample'}:
            return f'{self.target} was begun with other images ({before["images"]}, now {self.card["images"]})'
        if differs:
            pairs = {key: brief_values(before.get(key), self.card[key]) for key in sorted(differs)}
            parts = [f'{key} {old}, now {new}' for key, (old, new) in pairs.items()]
            return f'{self.target} holds features made in another way ({"; ".join(parts)})'
        for path, line in zip(self.source.paths, lines):
            if line['path'] != path:
                return f'{self.target} was begun with other images ({line["path"]} where {path} is now)'
        return ''

    def _header(self, rows: int) -> bytes:
        return header(self.target.suffix, rows, self.card['shape'], self.card['dtype'], self.card)

    def _write_card(self, more: dict[str, Any]) -> None:
        try:
            write_text(card_path(self.target), json.dumps({**self.card, **more}, indent=2) + '\n')
        except TrainError as error:
            raise FeatureError(str(error)) from error


def _versions() -> dict[str, str]:
    return {'hydra_vision': __version__, 'timm': timm.__version__, 'torch': str(torch.__version__)}
