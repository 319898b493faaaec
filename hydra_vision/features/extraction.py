"""Extraction: images through a model into a file, row by row, in constant memory, resumable."""

import csv
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..optional import require
from ..train.checkpoint import write_text
from ..train.errors import TrainError
from ..train.images import READ_ERRORS
from ..version import __version__
from .backbone import Backbone, Size, load_backbone
from .errors import FeatureError
from .files import FORMATS, LOG_FIELDS, Features, card_path, header, load_features, log_path, read_log, to_parquet
from .pooling import POOLS, check_layers, image_features
from .sources import Images, open_images

__all__ = ['default_workers', 'extract', 'feature_batches']

_DTYPES = ('float32', 'float16')
_TEXT = dict(newline='', encoding='utf-8', errors='surrogateescape')
_COMMIT_SECONDS = 1.0  # at most this much work is lost in a kill


def extract(
    images: Any,
    out: Union[str, Path],
    *,
    model: Union[str, Backbone, None] = None,
    checkpoint: Union[str, Path, None] = None,
    random_init: bool = False,
    model_kwargs: Optional[Mapping[str, Any]] = None,
    data: Optional[Mapping[str, Any]] = None,
    img_size: Optional[Size] = None,
    pool: str = 'avg',
    layers: Optional[Sequence[int]] = None,
    batch_size: int = 64,
    workers: Optional[int] = None,
    device: str = 'auto',
    amp: str = 'auto',
    dtype: str = 'float32',
    max_unreadable: int = 10,
    overwrite: bool = False,
    on_progress: Optional[Callable[[int, int], None]] = None,
) -> Features:
    """Write the features of images to a file, and open it.

    Beside ``out`` appear ``out.csv``, a line for every image with its row or with the reason why it has none, and
    ``out.json``, how the features were made. While the work goes on, rows are in ``out.partial``: the same call
    continues an interrupted one after the last committed row. Memory holds a batch of images and the list of names.

    Args:
        images: As in ``open_images``: a folder, .tar, .txt list, data set.
        out: File that ends in .npy, .safetensors or .parquet (written twice: raw rows, then the table).
        model: Name of a timm model, or a loaded ``Backbone``; the following six are for ``load_backbone``.
        checkpoint: Run or file of weights.
        random_init: Untrained weights.
        model_kwargs: Further arguments of ``timm.create_model``.
        data: Replaces entries of the data config.
        img_size: Side or (H, W).
        pool: A key of ``POOLS``.
        layers: Indices of layers, joined along D in ascending order (``Features.layer`` takes them apart); None for the
            final features.
        batch_size: Images at a time.
        workers: Loader processes; None for one a core, at most 16.
        device: 'auto', 'cpu', 'cuda', ...
        amp: Autocast: 'auto' (bf16 on CUDA, else none), 'none', 'bf16', 'fp16'.
        dtype: Of the rows: 'float32' or 'float16'.
        max_unreadable: Images that may be skipped; one more ends the work (what is done is kept).
        overwrite: Replace ``out`` where it was made in another way, instead of raising.
        on_progress: Called with (images done, of how many).

    Raises:
        FeatureError: Anything that does not fit, before the first image is read; ``out`` made from another model, other
            settings or other images; too many unreadable images.
        MissingExtraError: .parquet without pyarrow.
    """
    target = _check_target(out)
    for name, value, allowed in (('pool', pool, POOLS), ('dtype', dtype, _DTYPES)):
        if value not in allowed:
            raise FeatureError(f'{name} = {value!r}; allowed: {", ".join(allowed)}')
    workers = default_workers() if workers is None else workers
    for name, value, low in (
        ('batch_size', batch_size, 1),
        ('workers', workers, 0),
        ('max_unreadable', max_unreadable, 0),
    ):
        if value < low:
            raise FeatureError(f'{name} = {value}; it must be at least {low}')
    source = open_images(images)
    if isinstance(model, Backbone):
        given = dict(checkpoint=checkpoint, model_kwargs=model_kwargs, data=data, img_size=img_size)
        given = [key for key, value in given.items() if value is not None] + ['random_init'] * random_init
        if given:
            raise FeatureError(f'{", ".join(given)}: a loaded model is taken as it is')
        backbone = model
    else:
        backbone = load_backbone(
            model,
            checkpoint=checkpoint,
            random_init=random_init,
            model_kwargs=model_kwargs,
            data=data,
            img_size=img_size,
            device=device,
        )
    layers = check_layers(backbone.model, layers)
    shape, widths = _row_shape(backbone, pool, layers)
    card = {
        'model': backbone.name,
        'weights': backbone.weights,
        'fingerprint': backbone.fingerprint(),
        'data': {key: list(v) if isinstance(v, tuple) else v for key, v in backbone.data.items()},
        'pool': pool,
        'layers': None if layers is None else list(layers),
        'widths': widths,
        'shape': list(shape),
        'dtype': dtype,
        'amp': _resolve_amp(amp, backbone),
        'images': source.name,
        'count': len(source),
        'labelled': source.classes is not None,
    }
    # A card holds what json gives back, so that a resumed extraction can compare it.
    job = _Job(target, source, json.loads(json.dumps(card)))
    if job.open(overwrite):
        if on_progress is not None:
            on_progress(job.done, len(source))
        loader = feature_batches(
            backbone,
            source,
            pool=pool,
            layers=layers,
            start=job.done,
            batch_size=batch_size,
            workers=workers,
            amp=card['amp'],
        )
        with job:
            for features, errors in loader:
                features = features.to(getattr(torch, dtype))
                if not features.isfinite().all():
                    where = f'{source.paths[job.done]} or one of the {len(errors) - 1} after it'
                    raise FeatureError(f'the features of {where} are not finite in {dtype} with amp {card["amp"]}')
                job.add(features.numpy(), errors)
                if len(job.skipped) > max_unreadable:
                    raise FeatureError(_too_many(job.skipped, max_unreadable))
                if on_progress is not None:
                    on_progress(job.done, len(source))
        job.finish()
    return load_features(target)


class _Job:
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

    def __enter__(self) -> '_Job':
        self.file = open(self.partial, 'ab')
        self.log = open(log_path(self.target), 'a', **_TEXT)
        self.committed = time.monotonic()
        return self

    def __exit__(self, *error: Any) -> None:
        self._commit()
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
        while lines and lines[-1]['row'] != '' and int(lines[-1]['row']) >= whole:
            lines.pop()
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
        try:
            return json.loads(card_path(self.target).read_text())
        except ValueError as error:
            raise FeatureError(f'{card_path(self.target)} is damaged: remove it, or choose another file') from error

    def _conflict(self, before: Optional[dict[str, Any]], lines: list[dict[str, str]]) -> str:
        """Why what is there cannot be continued; '' where it can, or where nothing is there."""
        if before is None:
            return f'{self.target} exists and is not of this extraction' if self.target.exists() else ''
        differs = {key for key in self.card if before.get(key) != self.card[key]}
        if 'fingerprint' in differs:
            differs = {'fingerprint'} if before['model'] == self.card['model'] else {'model'}
        if differs:
            parts = [f'{key} {_brief(before.get(key))}, now {_brief(self.card[key])}' for key in sorted(differs)]
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


def feature_batches(
    backbone: Backbone,
    source: Images,
    *,
    pool: str,
    layers: Optional[Sequence[int]] = None,
    start: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    amp: str = 'none',
) -> Iterator[tuple[Tensor, list[str]]]:
    """Features of images from ``start`` on, in order, with float32 rows only for those that could be read.

    Yields:
        Features (readable images, ...) on the CPU, and for every image of the batch its error, '' for none.

    Raises:
        FeatureError: A batch that does not fit into memory.
    """
    device = next(backbone.model.parameters()).device
    dataset = Subset(_Tensors(source, backbone), range(start, len(source)))
    loader = DataLoader(dataset, batch_size, num_workers=workers, collate_fn=_collate, pin_memory=device.type == 'cuda')
    autocast = {'none': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}[amp]
    for x, errors in loader:
        if not len(x):
            yield torch.empty(0), errors
            continue
        try:
            with torch.inference_mode(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                y = image_features(backbone.model, x.to(device, non_blocking=True), pool=pool, layers=layers)
            yield y.float().cpu(), errors
        except torch.OutOfMemoryError as error:
            raise FeatureError(f'{len(x)} images do not fit into the memory of {device}: lower batch_size') from error


class _Tensors(Dataset):
    """Images as tensors; one that cannot be read is None with the reason."""

    def __init__(self, source: Images, backbone: Backbone) -> None:
        self.source, self.rules, self.transform = source, backbone.rules, backbone.transform()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Optional[Tensor], str]:
        try:
            with self.source.load(index) as image:
                image = self.rules.apply(image)
        except READ_ERRORS as error:
            text = ' '.join(str(error).split()) or 'no reason given'
            return None, f'{type(error).__name__}: {text}'
        return self.transform(image), ''


def _collate(samples: list[tuple[Optional[Tensor], str]]) -> tuple[Tensor, list[str]]:
    good = [x for x, _ in samples if x is not None]
    return torch.stack(good) if good else torch.empty(0), [error for _, error in samples]


def default_workers() -> int:
    """One loader process a core that this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return min(cores, 16)


def _check_target(out: Union[str, Path]) -> Path:
    target = Path(out).expanduser()
    if target.suffix not in FORMATS:
        raise FeatureError(f'out = {str(out)!r}; its name must end in {", ".join(FORMATS)}')
    if target.suffix == '.parquet':
        require('pyarrow', 'eval')
    if target.is_dir() or not target.parent.is_dir():
        raise FeatureError(
            f'out = {str(out)!r} cannot be written: {"it is a folder" if target.is_dir() else "no such folder"}'
        )
    if not os.access(target.parent, os.W_OK):
        raise FeatureError(f'out = {str(out)!r} cannot be written: no permission in {target.parent}')
    return target


def _row_shape(backbone: Backbone, pool: str, layers: Optional[Sequence[int]]) -> tuple[tuple[int, ...], list[int]]:
    """Shape of a row and the width of each layer, from one empty image: what cannot run fails here."""
    device = next(backbone.model.parameters()).device
    x = torch.zeros(1, *backbone.data['input_size'], device=device)
    try:
        with torch.inference_mode():
            shape = tuple(image_features(backbone.model, x, pool=pool, layers=layers).shape[1:])
            axis = -1 if pool == 'tokens' else 0
            if layers is None or len(layers) == 1:
                return shape, [shape[axis]]
            each = [image_features(backbone.model, x, pool=pool, layers=[layer]).shape[1:] for layer in layers]
            return shape, [one[axis] for one in each]
    except (AssertionError, RuntimeError) as error:
        raise FeatureError(f'{backbone.name} cannot run on {tuple(x.shape)}: {str(error).strip()}') from error


def _resolve_amp(amp: str, backbone: Backbone) -> str:
    device = next(backbone.model.parameters()).device
    if amp == 'auto':
        return 'bf16' if device.type == 'cuda' and torch.cuda.is_bf16_supported() else 'none'
    if amp not in ('none', 'bf16', 'fp16'):
        raise FeatureError(f'amp = {amp!r}; allowed: auto, none, bf16, fp16')
    return amp


def _too_many(skipped: Sequence[str], limit: int) -> str:
    shown = '; '.join(itertools.islice(skipped, 5)) + (f' and {len(skipped) - 5} more' if len(skipped) > 5 else '')
    return f'{len(skipped)} unreadable images, max_unreadable = {limit}: {shown}'


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + '...'


def _versions() -> dict[str, str]:
    import timm

    return {'hydra_vision': __version__, 'timm': timm.__version__, 'torch': str(torch.__version__)}
