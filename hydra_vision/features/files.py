"""Files of features: .npy, .safetensors and .parquet, written in shards that are joined, read as one array."""

import csv
import io
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import timm
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from ..errors import DataError, FeatureError, require
from ..io import to_path, write_atomically, write_text
from ..version import __version__
from .sources import Images

__all__ = [
    'FORMATS',
    'FeatureWriter',
    'Features',
    'brief_values',
    'card_path',
    'load_features',
    'log_path',
    'only_writer',
]

FORMATS = ('.npy', '.safetensors', '.parquet')
_LOG_FIELDS = ('row', 'path', 'class', 'error')
_CARD_KEYS = {'model', 'images', 'shape', 'dtype', 'pool', 'layers', 'widths', 'labelled'}  # what reading needs
_NAMES = {'weights', 'images'}  # the same by another path; fingerprint, sample and lines say whether they are
_SHARD_SECONDS = 10.0  # at most this much work is lost in a kill
_SHARD_BYTES = 64 * 1024**2  # of rows in memory
_LOCK_SECONDS = 8.0  # loader processes hold the lock of a killed run for up to five seconds


@dataclass(frozen=True)
class Features:
    """Features of images, and where they come from.

    Args:
        path: The file.
        paths: The image of each row.
        classes: The class of each row; None where the images had none.
        skipped: Images that could not be read and have no row, with the reason.
        card: Metadata, how they were made: model, weights, preprocessing, pooling.
    """

    path: Path
    paths: list[str]
    classes: list[str] | None
    skipped: dict[str, str]
    card: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, D), (rows, tokens, D) or (rows, D, h, w)."""
        return (len(self.paths), *self.card['shape'])

    @cached_property
    def array(self) -> np.ndarray:
        """The features, of `shape`; read from the disk as they are used, but for .parquet: at the first use."""
        return _open_array(self.path, self.shape, self.card['dtype'])

    def layer(self, index: int) -> np.ndarray:
        """The part of `array` that one of several layers gave, by the layer's index in the model.

        Raises:
            FeatureError: The file does not hold this layer.
        """
        layers = self.card['layers'] or []
        if index not in layers:
            raise FeatureError(f'layer {index} is not in these features; they have {layers or "the final layer only"}')
        at = layers.index(index)
        start, stop = sum(self.card['widths'][:at]), sum(self.card['widths'][: at + 1])
        return self.array[..., start:stop] if self.card['pool'] != 'none' else self.array[:, start:stop]


def card_path(file: Path) -> Path:
    """The JSON next to a file of features that says how they were made."""
    return file.with_name(file.name + '.json')


def log_path(file: Path) -> Path:
    """The CSV next to a file of features with one line per image: its row, or why it has none."""
    return file.with_name(file.name + '.csv')


def brief_values(one: Any, other: Any) -> tuple[str, str]:
    """Two values of a card that differ, as short texts; of dictionaries, such as arguments, what differs in them."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [name for name in {**one, **other} if one.get(name) != other.get(name)]
        one, other = ({name: each[name] for name in keys if name in each} for each in (one, other))
    texts = (json.dumps(value) for value in (one, other))
    return tuple(text if len(text) <= 60 else text[:57] + '...' for text in texts)


def load_features(path: str | Path) -> Features:
    """Open a file that `extract` wrote.

    Raises:
        FeatureError: No such file, not finished, without its card or its lines, or they do not agree.
    """
    path = to_path(path, 'features')
    if path.suffix not in FORMATS:
        raise FeatureError(f'{path} is no file of features; allowed: {", ".join(FORMATS)}')
    if not path.is_file():
        started = _shard_folder(path).is_dir()
        raise FeatureError(f'{path} is not finished: run the same extraction again' if started else f'no file {path}')
    for other in (card_path(path), log_path(path)):
        if not other.is_file():
            raise FeatureError(f'{path} has no {other.name} next to it; it was not written by hydra-vision extract')
    card, lines = _read_card(card_path(path)), _read_log(path)
    kept = [line for line in lines if line['row'] != '']
    try:
        rows = _count_rows(path)
        if path.suffix != '.parquet':  # which would be read whole
            _open_array(path, (rows, *card['shape']), card['dtype'])
    except (OSError, EOFError, ValueError, SafetensorError) as error:  # those of pyarrow are OSError and ValueError
        raise FeatureError(f'{path} is damaged: remove it and extract again') from error
    if [line['row'] for line in kept] != [str(row) for row in range(rows)]:
        raise FeatureError(f'{path} has {rows} rows, {log_path(path).name} lists {len(kept)} others')
    return Features(
        path=path,
        paths=[line['path'] for line in kept],
        classes=[line['class'] for line in kept] if card['labelled'] else None,
        skipped={line['path']: line['error'] for line in lines if line['row'] == ''},
        card=card,
    )


def _read_card(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text())
        if not isinstance(card, dict) or not card.keys() >= _CARD_KEYS:
            raise ValueError('not a card')
    except ValueError as error:
        raise FeatureError(f'{path} is damaged: extract to another file, or remove it') from error
    return card


def _read_log(file: Path) -> list[dict[str, str]]:
    with open(log_path(file), newline='', encoding='utf-8', errors='surrogateescape') as stream:
        lines = list(csv.DictReader(stream))
    if any(tuple(line) != _LOG_FIELDS or None in line.values() for line in lines):
        raise FeatureError(f'{log_path(file)} is damaged: extract to another file, or remove it')
    return lines


def _count_rows(path: Path) -> int:
    if path.suffix == '.npy':
        return len(np.load(path, mmap_mode='r'))
    if path.suffix == '.safetensors':
        with safe_open(path, 'numpy') as file:
            return file.get_slice('features').get_shape()[0]
    return require('pyarrow.parquet', 'eval').read_metadata(path).num_rows


def _open_array(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if path.suffix == '.npy':
        return np.load(path, mmap_mode='r')
    if path.suffix == '.safetensors':  # one tensor, at the end of the file: numpy maps it, safetensors would copy it
        offset = path.stat().st_size - int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.memmap(path, mode='r', dtype=dtype, offset=offset, shape=shape)
    parquet = require('pyarrow.parquet', 'eval')
    chunks = parquet.read_table(path, columns=['features'])['features'].chunks
    array, row = np.empty((shape[0], int(np.prod(shape[1:]))), dtype), 0
    for chunk in chunks:
        array[row : row + len(chunk)] = chunk.flatten().to_numpy(zero_copy_only=False).reshape(len(chunk), -1)
        row += len(chunk)
    return array.reshape(shape)


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


def _shard_folder(target: Path) -> Path:
    return target.with_name(target.name + '.partial')


class FeatureWriter:
    """Writes the features of a source in shards, which survive an interruption, and joins them at the end.

    `out.partial/` holds `card.json` and the shards, `NUMBER.safetensors`: the rows of the images from NUMBER on, with
    the names of all its images and the errors of those without a row as metadata. Each is complete or not there.

    Args:
        target: The file of features.
        source: The images.
        card: How the features are made.
    """

    def __init__(self, target: Path, source: Images, card: dict[str, Any]) -> None:
        self.target, self.source, self.card = target, source, card
        self.folder = _shard_folder(target)
        self.done = 0  # images, those of this shard included
        self.shards: list[Path] = []
        self.skipped: list[str] = []
        self._start = 0  # images in finished shards
        self._pending: list[tuple[np.ndarray, list[str]]] = []
        self._begun = time.monotonic()

    def open(self, overwrite: bool) -> bool:
        """Compare with what is there and get ready; False where the file is finished already.

        Raises:
            FeatureError: What is there was made in another way, and `overwrite` is False.
        """
        conflict = self._conflict()
        if conflict and not overwrite:
            raise FeatureError(f'{conflict}: choose another file, or overwrite it')
        if conflict:
            for path in (self.target, log_path(self.target), card_path(self.target)):
                path.unlink(missing_ok=True)
            self._remove_folder()
            self.done, self.shards, self.skipped = 0, [], []
        if self.target.exists():
            self._remove_folder()  # of a process that was killed after its last step
            return False
        self._start = self.done
        self.folder.mkdir(exist_ok=True)
        write_text(self.folder / 'card.json', json.dumps(self.card, indent=2) + '\n')
        return True

    def __enter__(self) -> 'FeatureWriter':
        self._begun = time.monotonic()
        return self

    def __exit__(self, *error: Any) -> None:
        self._flush()

    def add(self, features: np.ndarray, errors: list[str]) -> None:
        """Take the rows of the next images; `errors` has an entry for each, '' for those that have a row."""
        self._pending.append((features, errors))  # in one step: an interruption must not part rows from their images
        for image, error in zip(self.source.paths[self.done :], errors):
            if error:
                self.skipped.append(f'{image}: {error}')
        self.done += len(errors)
        large = sum(rows.nbytes for rows, _ in self._pending) >= _SHARD_BYTES
        if large or time.monotonic() - self._begun > _SHARD_SECONDS:
            self._flush()

    def finish(self) -> None:
        """Join the shards, describe, rename: from then on the file is there, and complete.

        Raises:
            DataError: Not one image could be read.
        """
        if len(self.skipped) == len(self.source):
            raise DataError(f'not one of {len(self.source)} images could be read: {self.skipped[0]}')
        lines = self._lines()
        joined = self.folder / f'joined{self.target.suffix}'
        rows = sum(line[0] != '' for line in lines)
        {'.npy': _join_npy, '.safetensors': _join_safetensors, '.parquet': _join_parquet}[self.target.suffix](
            joined, self.shards, rows, self.card, [line for line in lines if line[0] != '']
        )
        with open(joined, 'rb') as file:
            os.fsync(file.fileno())
        text = io.StringIO(newline='')
        csv.writer(text, lineterminator='\n').writerows([_LOG_FIELDS, *lines])
        data = text.getvalue().encode(errors='surrogateescape')
        write_atomically(log_path(self.target), lambda file: file.write(data))
        versions = {'hydra_vision': __version__, 'timm': timm.__version__, 'torch': str(torch.__version__)}
        card = {**self.card, 'rows': rows, 'skipped': self.skipped, 'versions': versions}
        write_text(card_path(self.target), json.dumps(card, indent=2) + '\n')
        os.replace(joined, self.target)
        self._remove_folder()

    def _flush(self) -> None:
        """The images since the last shard as a new one."""
        if not self._pending:
            return
        errors = [error for _, each in self._pending for error in each]
        end = self._start + len(errors)
        path = self.folder / f'{self._start:012d}.safetensors'
        metadata = {'paths': json.dumps([*self.source.paths[self._start : end]]), 'errors': json.dumps(errors)}
        rows = [each for each, _ in self._pending if len(each)]
        dtype, shape = np.dtype(self.card['dtype']), tuple(self.card['shape'])
        features = np.concatenate(rows) if rows else np.empty((0, *shape), dtype)
        data = safetensors.numpy.save({'features': np.ascontiguousarray(features, dtype)}, metadata)
        write_atomically(path, lambda file: file.write(data))
        self.shards.append(path)
        self._start, self._pending = end, []
        self._begun = time.monotonic()

    def _conflict(self) -> str:
        """Why what is there cannot be continued; '' where it can, or where nothing is there. Counts the shards."""
        described = self.folder / 'card.json'
        if self.target.exists():
            described = card_path(self.target)
            if not (described.is_file() and log_path(self.target).is_file()):
                return f'{self.target} exists and is not of this extraction'
        elif not described.is_file():
            there = self.folder.exists() and not self.folder.is_dir()
            return f'{self.folder} exists and is not of this extraction' if there else ''
        before = _read_card(described)
        differs = {key for key in self.card if before.get(key) != self.card[key]} - _NAMES
        if 'fingerprint' in differs:
            differs = {'fingerprint'} if before['model'] == self.card['model'] else {'model'}
        if differs == {'sample'}:
            return f'{self.target} was begun with other images ({before["images"]}, now {self.card["images"]})'
        if differs:
            pairs = {key: brief_values(before.get(key), self.card[key]) for key in sorted(differs)}
            parts = [f'{key} {old}, now {new}' for key, (old, new) in pairs.items()]
            return f'{self.target} holds features made in another way ({"; ".join(parts)})'
        if self.target.exists():
            names = [line['path'] for line in _read_log(self.target)]
        else:
            self._count_shards()
            names = [line[1] for line in self._lines()]
        for path, name in zip(self.source.paths, names):
            if name != path:
                return f'{self.target} was begun with other images ({name} where {path} is now)'
        return ''

    def _count_shards(self) -> None:
        """Take over the shards up to the first that is missing or damaged; later ones go."""
        self.done, self.shards, self.skipped = 0, [], []
        for path in sorted(self.folder.glob('*.safetensors')):
            paths, errors = _shard_lines(path)
            if path.stem == f'{self.done:012d}' and paths:
                self.shards.append(path)
                self.done += len(paths)
                self.skipped += [f'{name}: {error}' for name, error in zip(paths, errors) if error]
            else:
                path.unlink()

    def _lines(self) -> list[tuple[Any, ...]]:
        """Row, path, class and error of every image of the shards."""
        lines: list[tuple[Any, ...]] = []
        row = 0
        for shard in self.shards:
            for path, error in zip(*_shard_lines(shard)):
                classes = self.source.classes
                label = '' if classes is None or len(lines) >= len(classes) else classes[len(lines)]
                lines.append(('' if error else row, path, label, error))
                row += not error
        return lines

    def _remove_folder(self) -> None:
        if self.folder.is_dir():
            shutil.rmtree(self.folder)
        else:
            self.folder.unlink(missing_ok=True)


def _shard_lines(path: Path) -> tuple[list[str], list[str]]:
    """Names and errors of the images of a shard; empty where it is damaged."""
    try:
        with safe_open(path, 'numpy') as file:
            metadata = file.metadata()
            return json.loads(metadata['paths']), json.loads(metadata['errors'])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return [], []


def _shard_rows(path: Path) -> np.ndarray:
    with safe_open(path, 'numpy') as file:
        return file.get_tensor('features')


def _join_npy(path: Path, shards: Sequence[Path], rows: int, card: dict[str, Any], lines: Sequence[tuple]) -> None:
    header = {
        'descr': np.lib.format.dtype_to_descr(np.dtype(card['dtype'])),
        'fortran_order': False,
        'shape': (rows, *card['shape']),
    }
    with open(path, 'wb') as file:
        np.lib.format.write_array_header_1_0(file, header)
        for shard in shards:
            file.write(_shard_rows(shard).data)


def _join_safetensors(
    path: Path, shards: Sequence[Path], rows: int, card: dict[str, Any], lines: Sequence[tuple]
) -> None:
    flat = path.with_suffix('.npy')
    _join_npy(flat, shards, rows, card, lines)
    array = np.load(flat, mmap_mode='r')  # of any size, never in memory as a whole
    safetensors.numpy.save_file({'features': array}, path, metadata={'hydra_vision': json.dumps(card)})
    path.chmod(flat.stat().st_mode)  # safetensors makes private files


def _join_parquet(path: Path, shards: Sequence[Path], rows: int, card: dict[str, Any], lines: Sequence[tuple]) -> None:
    """Columns path, class (where there are any) and features, one row group per shard.

    `features` is a FixedSizeList; rows of more than one axis are flat, their shape is in the schema's metadata.
    """
    pa = require('pyarrow', 'eval')
    parquet = require('pyarrow.parquet', 'eval')
    width, value = int(np.prod(card['shape'])), pa.from_numpy_dtype(np.dtype(card['dtype']))
    fields = [pa.field('path', pa.string()), pa.field('features', pa.list_(value, width))]
    if card['labelled']:
        fields.insert(1, pa.field('class', pa.string()))
    schema = pa.schema(fields, metadata={'hydra_vision': json.dumps(card)})
    # Random mantissas neither compress nor repeat: only the text columns get a dictionary and a codec.
    text = [field.name for field in fields if field.name != 'features']
    codecs = dict.fromkeys(text, 'snappy') | {'features.list.element': 'none'}
    row = 0
    with parquet.ParquetWriter(path, schema, use_dictionary=text, compression=codecs) as writer:
        for shard in shards:
            array = _shard_rows(shard)
            part, row = lines[row : row + len(array)], row + len(array)
            columns = {
                'path': pa.array([_printable(line[1]) for line in part], pa.string()),
                'class': pa.array([_printable(line[2]) for line in part], pa.string()),
                'features': pa.FixedSizeListArray.from_arrays(pa.array(array.ravel(), value), width),
            }
            writer.write_table(pa.table([columns[field.name] for field in fields], schema=schema))


def _printable(path: str) -> str:
    """Parquet's strings are UTF-8; file names need not be."""
    return path.encode('utf-8', 'backslashreplace').decode()
