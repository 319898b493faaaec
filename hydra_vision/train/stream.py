"""Streamed sets that survive unreadable images under the same rules as others: counted, named, limited.

timm's webdataset reader skips whatever fails with a line in the log, and its Hugging Face reader stops at the first
failure. Here their readers deliver undecoded or unconverted images, and this file decides.
"""

import io
import multiprocessing
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from timm.data import IterableImageDataset
from torch.utils.data import get_worker_info

from hydra_vision.errors import DataError, first_line
from hydra_vision.images import READ_ERRORS, ImageRules

_NAMED, _NAME_BYTES = 5, 200  # names that a report gives, and room for each


class UnreadableLog:
    """Names of unreadable images in memory that the loader processes share; a name counts once.

    Args:
        split: what messages call the set.
        limit: how many are allowed.
    """

    def __init__(self, split: str, limit: int):
        self.split, self.limit = split, limit
        self._lock = multiprocessing.Lock()
        self._count = torch.zeros((), dtype=torch.int64).share_memory_()
        self._hashes = torch.zeros(limit + 1, dtype=torch.int64).share_memory_()
        self._names = torch.zeros(_NAMED, _NAME_BYTES, dtype=torch.uint8).share_memory_()

    def add(self, name: str, error: BaseException) -> None:
        """Remembers a name.

        Raises:
            DataError: one more than is allowed.
        """
        code = name.encode(errors='replace')
        key = zlib.crc32(code) + (len(code) << 32)
        with self._lock:
            count = int(self._count)
            if count <= self.limit and not bool((self._hashes[:count] == key).any()):
                self._hashes[count] = key
                if count < _NAMED:
                    shown = torch.frombuffer(bytearray(code[-_NAME_BYTES:]), dtype=torch.uint8)
                    self._names[count, : len(shown)] = shown
                self._count += 1
            if int(self._count) > self.limit:
                raise DataError(self.report()) from error

    def names(self) -> list[str]:
        """The first few names."""
        rows = self._names[: min(int(self._count), _NAMED)]
        return [bytes(row.tolist()).rstrip(b'\0').decode(errors='replace') for row in rows]

    def __len__(self) -> int:
        return int(self._count)

    def report(self) -> str:
        """One line on what could not be read."""
        count, names = len(self), self.names()
        shown = ', '.join(names) + (f' and {count - len(names)} more' if count > len(names) else '')
        return (
            f'{count} unreadable {"image" if count == 1 else "images"} in the {self.split} split: {shown} '
            f'(allowed: data.max_unreadable={self.limit})'
        )


class ReadableStream(IterableImageDataset):
    """timm's streamed set with our rules for images.

    Args:
        dataset: from `timm.data.create_dataset`, opened with `input_img_mode=''`.
        split: what messages call it.
        max_unreadable: how many images may be skipped.
        num_classes: class indices must be below it.
        rules: how images are converted.
    """

    def __init__(
        self, dataset: IterableImageDataset, *, split: str, max_unreadable: int, num_classes: int, rules: ImageRules
    ):
        super().__init__(None, reader=dataset.reader)
        self.split, self.num_classes, self.rules = split, num_classes, rules
        self.log = UnreadableLog(split, max_unreadable)
        self._ready = False

    def set_loader_cfg(self, num_workers: int | None = None) -> None:
        """Tells the reader how many loader processes there will be.

        Raises:
            DataError: training with more loader processes than shards, of which the last would never give an image.
        """
        reader, workers = self.reader, max(1, num_workers or 0)
        super().set_loader_cfg(workers)  # timm 1.0.29 takes 0, the main process alone, for no image at all
        shards = shard_count(reader)
        replicas = getattr(reader, 'dist_num_replicas', 1)
        if getattr(reader, 'is_training', False) and shards is not None and shards < workers * replicas:
            raise DataError(
                f'the {self.split} split has {shards} shards for {replicas} x {workers} loader processes, and a shard '
                f'is read by one process: --workers {shards // replicas} at most, or split the set into more shards'
            )

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        if not self._ready:
            self._prepare()
        training = getattr(self.reader, 'is_training', False)
        last: tuple[Image.Image, int] | None = None
        owed = 0  # every process must give as many images as it told: a readable one comes again for an unreadable one
        for number, (image, target) in enumerate(self._read()):
            try:
                image = self.rules.apply(self._decoded(image))
            except READ_ERRORS as error:
                self.log.add(self._name(image, number), error)
                owed += training
                continue
            last = image, self._checked(target)
            for _ in range(1 + owed):
                yield self._transformed(image), last[1]
            owed = 0
        for _ in range(owed if last is not None else 0):  # the last ones were unreadable
            yield self._transformed(last[0]), last[1]

    def _read(self) -> Iterator[tuple[Any, Any]]:
        """The reader's samples; what it raises as an error of the data."""
        samples = iter(self.reader)
        while True:
            try:
                sample = next(samples, None)
            except (ValueError, KeyError, RuntimeError, OSError) as error:
                raise DataError(f'the {self.split} split cannot be read: {first_line(error)}') from error
            if sample is None:
                return
            yield sample

    def unreadable(self) -> list[str]:
        """Names of the images that could not be read so far, at most the first five."""
        return self.log.names()

    def report(self) -> str:
        """One line on what could not be read."""
        return self.log.report()

    def _prepare(self) -> None:
        """Makes the reader's pipeline, in the process that reads, report failures instead of hiding them.

        Raises:
            RuntimeError: a reader of another build than the known ones, whose failures would stay hidden.
        """
        reader, self._ready = self.reader, True
        kind = type(reader).__name__
        if kind == 'ReaderWds':
            reader._lazy_init()
            stages = [stage for stage in reader.ds.pipeline if 'handler' in getattr(stage, 'kw', {})]
            if len(stages) < 2:
                raise RuntimeError(f"timm's webdataset pipeline is built in an unknown way: {reader.ds.pipeline}")
            for stage in stages:
                stage.kw['handler'] = self._shard_failed
                if stage.args:
                    stage.args = (self._guarded(stage.args[0]), *stage.args[1:])
        elif kind == 'ReaderHfids':
            from datasets import Image as ImageFeature

            reader._lazy_init()
            reader.ds = reader.ds.cast_column(reader.input_key, ImageFeature(decode=False))

    def _guarded(self, decode: Callable[[dict], dict | None]) -> Callable[[dict], dict | None]:
        """A sample's decoding: None, which leaves it out, where the image cannot be read."""

        def guarded(sample: dict[str, Any]) -> dict[str, Any] | None:
            name = f'{sample.get("__url__", "")}:{sample.get("__key__", "")}'
            try:
                return decode(sample)
            except READ_ERRORS as error:
                if type(error).__name__ == 'WdsTargetKeyError':  # a ValueError, but of the recipe
                    raise DataError(str(error)) from error
                self.log.add(name, error)
                return None
            except (KeyError, TypeError) as error:
                fields = ', '.join(key for key in sample if not key.startswith('__'))
                raise DataError(f'{name} has no field {error} (it has: {fields})') from error

        return guarded

    def _shard_failed(self, error: BaseException) -> bool:
        """An error outside of a sample's decoding: the rest of a shard would be lost."""
        if isinstance(error, DataError):
            raise error
        where = next((str(part) for part in reversed(error.args) if isinstance(part, str) and '.tar' in part), '')
        raise DataError(f'a shard of the {self.split} split is damaged: {where} {first_line(error)}') from error

    def _decoded(self, image: Any) -> Image.Image:
        """The image of a sample, which a Hugging Face set gives as its bytes or path."""
        if isinstance(image, dict):
            image = Image.open(io.BytesIO(image['bytes']) if image.get('bytes') is not None else image['path'])
        return image

    def _name(self, image: Any, number: int) -> str:
        path = image.get('path') if isinstance(image, dict) else getattr(image, 'filename', None)
        worker = get_worker_info()
        return path or f'image {number}' + ('' if worker is None else f' of loader process {worker.id}')

    def _transformed(self, image: Image.Image) -> Any:
        return image if self.transform is None else self.transform(image)

    def _checked(self, target: Any) -> int:
        target = int(target)
        if not 0 <= target < self.num_classes:
            raise DataError(
                f'an image of the {self.split} split has class {target}; the model has {self.num_classes} classes '
                f'(model.num_classes)'
            )
        return target


def shard_count(reader: Any) -> int | None:
    """Shards that loader processes share, None where the reader does not know or makes as many as are needed."""
    if type(reader).__name__ == 'ReaderWds':
        return len(reader.split_info.filenames)
    if type(reader).__name__ == 'ReaderHfids' and not reader.download:
        return getattr(reader.builder.as_streaming_dataset(split=reader.split), 'num_shards', None)
    return None
