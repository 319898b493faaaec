"""Files of features: .npy, .safetensors and .parquet, written row by row, read as one array."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from ..errors import require
from .errors import FeatureError

__all__ = [
    'FORMATS',
    'Features',
    'brief_values',
    'card_path',
    'header',
    'load_features',
    'log_path',
    'read_card',
    'read_log',
    'to_parquet',
]

FORMATS = ('.npy', '.safetensors', '.parquet')
LOG_FIELDS = ('row', 'path', 'class', 'error')
# Headers have one size whatever they say, so that the number of rows can be put in at the end.
_HEADER_BYTES = {'.npy': 256, '.safetensors': 8192, '.parquet': 0}
_SAFETENSORS_DTYPES = {'float32': 'F32', 'float16': 'F16'}
_PARQUET_BYTES = 32 * 1024**2  # of features in memory while a .parquet is written


@dataclass(frozen=True)
class Features:
    """Features of images, and where they come from.

    Args:
        path: The file.
        paths: The image of each row.
        classes: The class of each row; None where the images had none.
        skipped: Images that could not be read and have no row, with the reason.
        card: How they were made: model, weights, preprocessing, pooling.
    """

    path: Path
    paths: list[str]
    classes: Optional[list[str]]
    skipped: dict[str, str]
    card: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, D), (rows, tokens, D) or (rows, D, h, w)."""
        return (len(self.paths), *self.card['shape'])

    @cached_property
    def array(self) -> np.ndarray:
        """The features, of ``shape``; read from the disk as they are used, but for .parquet: at the first use."""
        return _open_array(self.path, self.shape, self.card['dtype'])

    def layer(self, index: int) -> np.ndarray:
        """The part of ``array`` that one of several layers gave, by the layer's index in the model.

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
    """The JSON beside a file of features that says how they were made."""
    return file.with_name(file.name + '.json')


def log_path(file: Path) -> Path:
    """The CSV beside a file of features with one line for every image: its row, or why it has none."""
    return file.with_name(file.name + '.csv')


def header(suffix: str, rows: int, shape: Sequence[int], dtype: str, card: dict[str, Any]) -> bytes:
    """First bytes of a file that holds ``rows`` rows of ``shape``; empty for .parquet."""
    size = _HEADER_BYTES[suffix]
    if suffix == '.npy':
        stream = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
        text = repr({'descr': descr, 'fortran_order': False, 'shape': (rows, *shape)}).encode()
        stream.write(np.lib.format.magic(1, 0))
        stream.write((size - 10).to_bytes(2, 'little'))
        stream.write(text.ljust(size - 11) + b'\n')
        return stream.getvalue()
    if suffix == '.safetensors':
        end = rows * int(np.prod(shape)) * np.dtype(dtype).itemsize
        text = json.dumps(
            {
                '__metadata__': {'hydra_vision': json.dumps(card)},
                'features': {'dtype': _SAFETENSORS_DTYPES[dtype], 'shape': [rows, *shape], 'data_offsets': [0, end]},
            }
        ).encode()
        if len(text) > size - 8:
            raise FeatureError(f'the description of the features has {len(text)} bytes; {size - 8} fit')
        return (size - 8).to_bytes(8, 'little') + text.ljust(size - 8)
    return b''


def read_card(file: Path) -> dict[str, Any]:
    """The JSON beside a file of features.

    Raises:
        FeatureError: It is damaged.
    """
    try:
        return json.loads(card_path(file).read_text())
    except ValueError as error:
        raise FeatureError(f'{card_path(file)} is damaged: extract to another file, or remove it') from error


def brief_values(one: Any, other: Any) -> tuple[str, str]:
    """Two values of a card that differ, as short texts; of dictionaries, such as arguments, what differs in them."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [name for name in {**one, **other} if one.get(name) != other.get(name)]
        one, other = ({name: each[name] for name in keys if name in each} for each in (one, other))
    texts = (json.dumps(value) for value in (one, other))
    return tuple(text if len(text) <= 60 else text[:57] + '...' for text in texts)


def read_log(file: Path) -> list[dict[str, str]]:
    """Lines of the CSV beside a file of features, without one that a kill cut off."""
    with open(log_path(file), newline='', encoding='utf-8', errors='surrogateescape') as stream:
        text = stream.read()
    complete = text[: text.rfind('\n') + 1]
    lines = list(csv.DictReader(io.StringIO(complete, newline='')))
    return [line for line in lines if None not in line.values() and None not in line]


def load_features(path: Union[str, Path]) -> Features:
    """Open a file that ``extract`` wrote.

    Raises:
        FeatureError: No such file, not finished, without its card or its lines, or they do not agree.
    """
    path = Path(path).expanduser()
    if path.suffix not in FORMATS:
        raise FeatureError(f'{path} is no file of features; allowed: {", ".join(FORMATS)}')
    if not path.is_file():
        started = path.with_name(path.name + '.partial').exists()
        raise FeatureError(f'{path} is not finished: run the same extraction again' if started else f'no file {path}')
    for beside in (card_path(path), log_path(path)):
        if not beside.is_file():
            raise FeatureError(f'{path} has no {beside.name} beside it; it was not written by hydra-vision extract')
    card = read_card(path)
    lines = read_log(path)
    kept = [line for line in lines if line['row'] != '']
    rows = _count_rows(path)
    if rows != len(kept) or [int(line['row']) for line in kept] != list(range(len(kept))):
        raise FeatureError(f'{path} has {rows} rows, {log_path(path).name} speaks of {len(kept)}')
    return Features(
        path=path,
        paths=[line['path'] for line in kept],
        classes=[line['class'] for line in kept] if card['labelled'] else None,
        skipped={line['path']: line['error'] for line in lines if line['row'] == ''},
        card=card,
    )


def _count_rows(path: Path) -> int:
    if path.suffix == '.npy':
        return len(np.load(path, mmap_mode='r'))
    if path.suffix == '.safetensors':
        return _safetensors_header(path)[0]['features']['shape'][0]
    return require('pyarrow.parquet', 'eval').read_metadata(path).num_rows


def _open_array(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if path.suffix == '.npy':
        return np.load(path, mmap_mode='r')
    if path.suffix == '.safetensors':
        return np.memmap(path, mode='r', dtype=dtype, offset=_safetensors_header(path)[1], shape=shape)
    parquet = require('pyarrow.parquet', 'eval')
    chunks = parquet.read_table(path, columns=['features'])['features'].chunks
    array, row = np.empty((shape[0], int(np.prod(shape[1:]))), dtype), 0
    for chunk in chunks:
        array[row : row + len(chunk)] = chunk.flatten().to_numpy(zero_copy_only=False).reshape(len(chunk), -1)
        row += len(chunk)
    return array.reshape(shape)


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the data begins."""
    with open(path, 'rb') as stream:
        size = int.from_bytes(stream.read(8), 'little')
        return json.loads(stream.read(size)), 8 + size


def to_parquet(rows: Path, target: Path, lines: list[dict[str, str]], card: dict[str, Any]) -> None:
    """Turn a file of raw rows into .parquet: columns path, class (where there are any) and features.

    ``features`` is a FixedSizeList; rows of more than one axis are flat, their shape is in the schema's metadata.
    """
    pa = require('pyarrow', 'eval')
    parquet = require('pyarrow.parquet', 'eval')
    width, dtype = int(np.prod(card['shape'])), np.dtype(card['dtype'])
    value = pa.from_numpy_dtype(dtype)
    fields = [pa.field('path', pa.string()), pa.field('features', pa.list_(value, width))]
    if card['labelled']:
        fields.insert(1, pa.field('class', pa.string()))
    schema = pa.schema(fields, metadata={'hydra_vision': json.dumps(card)})
    step = max(1, _PARQUET_BYTES // (width * dtype.itemsize))
    # Random mantissas neither compress nor repeat: only the text columns get a dictionary and a codec.
    text = [field.name for field in fields if field.name != 'features']
    codecs = dict.fromkeys(text, 'snappy') | {'features.list.element': 'none'}
    with (
        open(rows, 'rb') as stream,
        parquet.ParquetWriter(target, schema, use_dictionary=text, compression=codecs) as writer,
    ):
        for start in range(0, len(lines), step):
            part = lines[start : start + step]
            flat = np.fromfile(stream, dtype=dtype, count=len(part) * width)
            columns = {
                'path': pa.array([_printable(line['path']) for line in part], pa.string()),
                'class': pa.array([line['class'] for line in part], pa.string()),
                'features': pa.FixedSizeListArray.from_arrays(pa.array(flat, value), width),
            }
            writer.write_table(pa.table([columns[field.name] for field in fields], schema=schema))


def _printable(path: str) -> str:
    """Parquet's strings are UTF-8; file names need not be."""
    return path.encode('utf-8', 'backslashreplace').decode()
