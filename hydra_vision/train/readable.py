"""Data sets that survive unreadable images: they are counted, named, skipped, and end the run past a limit.

timm's own data set skips silently and without a limit, its webdataset reader logs and skips whatever fails, and its
Hugging Face reader stops at the first failure.
"""

import contextlib
import io
import json
import multiprocessing
import os
import random
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.data import ImageDataset, IterableImageDataset
from torch.utils.data import Dataset, get_worker_info

from ..device import available_cores
from ..errors import DataError, first_line
from ..images import READ_ERRORS, ImageRules
from .distributed import local_processes, world_from_environment
from .randomness import seed_generators, seeded
from .sampling import Draw

_NAMED, _NAME_BYTES = 5, 200  # names that a report gives, and room for each
_MEMORY_SHARE = 0.8  # of the memory that is free now: workers, batches and the model need some as well
_MEMORY_SAMPLE = 256  # images that the size of the whole set is estimated from


class UnreadableLog:
    """Names of unreadable images, in memory that the loader processes share; a name counts once.

    Args:
        split: Name of the set in messages.
        limit: Number of unreadable images that are allowed.
    """

    def __init__(self, split: str, limit: int):
        self.split, self.limit = split, limit
        self._lock = multiprocessing.Lock()
        self._count = torch.zeros((), dtype=torch.int64).share_memory_()
        self._hashes = torch.zeros(limit + 1, dtype=torch.int64).share_memory_()
        self._names = torch.zeros(_NAMED, _NAME_BYTES, dtype=torch.uint8).share_memory_()

    def add(self, name: str, error: BaseException) -> None:
        """Record a name.

        Raises:
            DataError: More than `limit`.
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

    def report(self) -> str:
        """One line on what could not be read."""
        return _report(int(self._count), self.names(), self.split, self.limit)


def _report(count: int, names: list[str], split: str, limit: int) -> str:
    shown = ', '.join(names[:_NAMED]) + (f' and {count - _NAMED} more' if count > _NAMED else '')
    return (
        f'{count} unreadable {"image" if count == 1 else "images"} in the {split} split: {shown} '
        f'(allowed: data.max_unreadable={limit})'
    )


def _checked_class(target: Any, num_classes: int, what: str) -> int:
    target = int(target)
    if not 0 <= target < num_classes:
        raise DataError(f'{what} has class {target}; the model has {num_classes} classes (model.num_classes)')
    return target


# Random access


class ReadableDataset(Dataset):
    """Wraps a map-style data set: an unreadable image is replaced by the next readable one and recorded.

    What loader processes find is kept in shared memory, so that the main process sees it, and an image counts once.

    Also makes augmentation reproducible: its random numbers follow from what the sampler gives for each image, so that
    neither the number of loader processes nor an interruption changes them.

    Args:
        dataset: Any map-style data set of (PIL image, class index).
        split: Name of the set in messages.
        max_unreadable: Number of images that may be skipped.
        num_classes: Class indices must be below it.
        rules: How images are converted.
        mask_skipped: Give the replacement the target -1, so that validation does not count an image twice.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        split: str,
        max_unreadable: int,
        num_classes: int,
        rules: ImageRules,
        mask_skipped: bool,
    ):
        self.dataset = dataset
        self.split = split
        self.max_unreadable = max_unreadable
        self.num_classes = num_classes
        self.rules = rules
        self.mask_skipped = mask_skipped
        self.transform: Callable[[Image.Image], Any] | None = None
        self._bad = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()
        self._decoded: list[np.ndarray | None] | None = None
        self._targets: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: int | Draw) -> tuple[Any, int]:
        index, entropy, counted = draw if isinstance(draw, Draw) else Draw(draw)
        for offset in range(len(self)):
            position = (index + offset) % len(self)
            if self._bad[position]:
                continue
            try:
                image, target = self._read(position)
                break
            except READ_ERRORS as error:
                self._mark(position, error)
        else:
            raise DataError(self.report())
        target = _checked_class(target, self.num_classes, f'{self.name_of(position)} of the {self.split} split')
        if not counted or (offset and self.mask_skipped):
            target = -1
        return self._transformed(image, entropy), target

    def unreadable(self) -> list[str]:
        """Names of the images that could not be read so far."""
        return [self.name_of(int(position)) for position in self._bad.nonzero()]

    def add_up(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Merge what other processes found.

        Args:
            total: Sums a tensor over the processes.
        """
        self._bad |= total(self._bad.int()) > 0

    def report(self) -> str:
        """One line on what could not be read."""
        names = self.unreadable()
        return _report(len(names), names, self.split, self.max_unreadable)

    def name_of(self, index: int) -> str:
        """File name of an image, or its number where the data set has no names."""
        if isinstance(self.dataset, ImageDataset):
            return str(self.dataset.filename(index))
        samples = getattr(self.dataset, 'samples', None)
        return str(samples[index][0]) if samples is not None else f'image {index}'

    def decode_into_memory(self) -> None:
        """Decode every image once, in threads. Loader processes that are forked later share the arrays.

        Raises:
            DataError: Too little memory, or more unreadable images than are allowed.
        """
        lock = threading.Lock()  # readers of archives share one open file

        def decode(index: int) -> np.ndarray | None:
            try:
                image, self._targets[index] = self._read(index, lock)
                return np.asarray(image)
            except READ_ERRORS as error:
                with lock:
                    self._mark(index, error)
                return None

        images: list[np.ndarray | None] = []
        console = Console()
        shown = console.is_terminal and world_from_environment().primary
        columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with (
            Progress(*columns, console=console, transient=True, disable=not shown) as bar,
            ThreadPoolExecutor(min(8, available_cores())) as pool,
        ):
            task = bar.add_task(f'decoding {self.split}', total=len(self))
            for start in range(0, len(self), _MEMORY_SAMPLE):  # in blocks, so that an error ends it soon
                images += pool.map(decode, range(start, min(start + _MEMORY_SAMPLE, len(self))))
                if start == 0:
                    _check_memory(images, len(self), self.split)
                bar.update(task, completed=len(images))
        self._decoded = images

    def _mark(self, index: int, error: BaseException) -> None:
        """Record an unreadable image; raise past the limit."""
        self._bad[index] = True
        if int(self._bad.sum()) > self.max_unreadable:
            raise DataError(self.report()) from error

    def _read(self, index: int, lock: 'threading.Lock | None' = None) -> tuple[Image.Image, int]:
        """Image and class of an index.

        Args:
            index: Of the wrapped set.
            lock: Held while the wrapped set reads, where threads share it; decoding needs no lock.
        """
        if self._decoded is not None:
            return Image.fromarray(self._decoded[index]), self._targets[index]
        with lock or contextlib.nullcontext():
            if isinstance(self.dataset, ImageDataset):
                stream, target, *_ = self.dataset.reader[index]
                if lock is not None:
                    with stream:
                        stream = io.BytesIO(stream.read())
            else:
                image, target = self.dataset[index]
                return self.rules.apply(image), target
        with stream, Image.open(stream) as image:
            return self.rules.apply(image), target

    def _transformed(self, image: Image.Image, entropy: tuple[int, ...]) -> Any:
        if self.transform is None:
            return image
        if not entropy:
            return self.transform(image)
        if get_worker_info() is not None:  # a loader process has its generators to itself
            seed_generators(entropy)
            return self.transform(image)
        with seeded(entropy):
            return self.transform(image)


def free_memory() -> int | None:
    """Bytes that this process may still take, by the system and by its control group; None where neither tells."""
    found = []
    try:
        for line in Path('/proc/meminfo').read_text().splitlines():
            if line.startswith('MemAvailable:'):
                found.append(int(line.split()[1]) * 1024)
        limit = Path('/sys/fs/cgroup/memory.max').read_text().strip()
        if limit != 'max':
            found.append(int(limit) - int(Path('/sys/fs/cgroup/memory.current').read_text()))
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def _check_memory(images: list[np.ndarray | None], count: int, split: str) -> None:
    """Raise DataError where `count` images of the size of the given ones would not fit into the free memory."""
    read = [image.nbytes for image in images if image is not None]
    free = free_memory()
    if not read or free is None:
        return
    processes = local_processes()
    needed = sum(read) / len(read) * count * processes
    if needed > _MEMORY_SHARE * free:
        each = f' in each of {processes} processes' if processes > 1 else ''
        raise DataError(
            f"data.cache='ram': {split} needs about {needed / processes / 2**30:.1f} GiB decoded{each}, "
            f'{free / 2**30:.1f} GiB are free here (up to {_MEMORY_SHARE:.0%} of them may be used); set data.cache=none'
        )


# Streams


class ReadableStream(IterableImageDataset):
    """timm's streamed set with our rules for images.

    Args:
        dataset: From `timm.data.create_dataset`, opened with `input_img_mode=''`.
        split: Name of the set in messages.
        max_unreadable: Number of images that may be skipped.
        num_classes: Class indices must be below it.
        rules: How images are converted.
    """

    def __init__(
        self, dataset: IterableImageDataset, *, split: str, max_unreadable: int, num_classes: int, rules: ImageRules
    ):
        super().__init__(None, reader=dataset.reader)
        self.split, self.num_classes, self.rules = split, num_classes, rules
        self.log = UnreadableLog(split, max_unreadable)
        self._ready = False

    def set_loader_cfg(self, num_workers: int | None = None) -> None:
        """Tell the reader how many loader processes there will be.

        Raises:
            DataError: Training with more loader processes than shards, of which the last would never give an image.
        """
        super().set_loader_cfg(num_workers)
        workers = max(1, num_workers or 0)
        shards = shard_count(self.reader)
        replicas = getattr(self.reader, 'dist_num_replicas', 1)
        if getattr(self.reader, 'is_training', False) and shards is not None and shards < workers * replicas:
            raise DataError(
                f'the {self.split} split has {shards} shards for {replicas} x {workers} loader processes, and a shard '
                f'is read by one process: --workers {shards // replicas} at most, or split the set into more shards'
            )

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        if not self._ready:
            self._prepare()
        training = getattr(self.reader, 'is_training', False)
        last: tuple[Image.Image, int] | None = None
        missing = 0  # repeat readable samples, so that the length of an epoch matches __len__ on every rank
        for number, (image, target) in enumerate(self._read()):
            try:
                image = self.rules.apply(self._opened(image))
            except READ_ERRORS as error:
                self.log.add(self._name(image, number), error)
                missing += training
                continue
            last = image, _checked_class(target, self.num_classes, f'an image of the {self.split} split')
            for _ in range(1 + missing):
                yield self._transformed(image), last[1]
            missing = 0
        for _ in range(missing if last is not None else 0):  # the last ones were unreadable
            yield self._transformed(last[0]), last[1]

    def unreadable(self) -> list[str]:
        """Names of the images that could not be read so far, at most the first five."""
        return self.log.names()

    def report(self) -> str:
        """One line on what could not be read."""
        return self.log.report()

    def _read(self) -> Iterator[tuple[Any, Any]]:
        """The reader's samples; raises its errors as errors of the data."""
        samples = iter(self.reader)
        while True:
            try:
                sample = next(samples, None)
            except (ValueError, KeyError, RuntimeError, OSError) as error:
                raise DataError(f'the {self.split} split cannot be read: {first_line(error)}') from error
            if sample is None:
                return
            yield sample

    def _prepare(self) -> None:
        """Set up the reader, in the process that reads, so that it reports failures instead of hiding them."""
        reader, self._ready = self.reader, True
        kind = type(reader).__name__
        if kind == 'ReaderWds':
            reader._lazy_init()  # numbers the loader processes
            reader.ds = self._webdataset()
        elif kind == 'ReaderHfids':
            from datasets import Image as ImageFeature

            reader._lazy_init()
            reader.ds = reader.ds.cast_column(reader.input_key, ImageFeature(decode=False))

    def _webdataset(self) -> Any:
        """Samples of webdataset shards: in the order of timm's reader, decoded and checked here."""
        import webdataset as wds
        from timm.data.readers.reader_wds import detshuffle2

        reader = self.reader

        def shards_of_worker(shards: Iterator[Any]) -> Iterator[Any]:
            for number, shard in enumerate(shards):
                if number % reader.global_num_workers == reader.global_worker_id:
                    yield shard

        stages = [wds.SimpleShardList([os.path.join(reader.root, name) for name in reader.split_info.filenames])]
        if reader.is_training:
            stages.append(detshuffle2(reader.shard_shuffle_size, seed=reader.common_seed, epoch=reader.epoch_count))
        stages += [shards_of_worker, wds.tarfile_to_samples(handler=self._shard_failed)]
        if reader.is_training:
            stages.append(
                wds.shuffle(
                    bufsize=reader.sample_shuffle_size,
                    initial=reader.sample_initial_size,
                    rng=random.Random(reader.worker_seed),
                )
            )
        stages.append(wds.map(self._decode, handler=self._shard_failed))
        return wds.DataPipeline(*stages)

    def _decode(self, sample: dict[str, Any]) -> dict[str, Any] | None:
        """Image and class of a webdataset sample; None, which skips it, where the image cannot be read."""
        from timm.data.readers.targets import get_field
        from webdataset.filters import getfirst

        reader, name = self.reader, f'{sample.get("__url__", "")}:{sample.get("__key__", "")}'
        key = reader.target_key or reader.split_info.alt_label
        try:
            target = int(get_field(json.loads(sample['json']), key) if key else sample['cls'])
            if key and target < 0:  # a label that the set marks as not to be used
                return None
            image = Image.open(io.BytesIO(getfirst(sample, reader.input_key)))
            image.load()
        except READ_ERRORS as error:
            self.log.add(name, error)
            return None
        except (KeyError, TypeError) as error:
            fields = ', '.join(field for field in sample if not field.startswith('__'))
            field = f'{key!r} in its json' if key else "'cls'"
            raise DataError(f'{name} has no class: no field {field} (it has: {fields})') from error
        return {'image': image, 'target': target}

    def _shard_failed(self, error: BaseException) -> bool:
        """Handler of the webdataset stages: whatever is not an unreadable image would lose the rest of a shard."""
        if isinstance(error, DataError):
            raise error
        where = next((str(part) for part in reversed(error.args) if isinstance(part, str) and '.tar' in part), '')
        raise DataError(f'a shard of the {self.split} split is damaged: {where} {first_line(error)}') from error

    def _opened(self, image: Any) -> Image.Image:
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


def shard_count(reader: Any) -> int | None:
    """Shards that loader processes share, None where the reader does not know or makes as many as are needed."""
    if type(reader).__name__ == 'ReaderWds':
        return len(reader.split_info.filenames)
    if type(reader).__name__ == 'ReaderHfids' and not reader.download:
        return getattr(reader.builder.as_streaming_dataset(split=reader.split), 'num_shards', None)
    return None
