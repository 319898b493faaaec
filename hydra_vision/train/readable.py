"""A data set that survives unreadable images: counts them, names them, skips them, and gives up past a limit."""

import contextlib
import io
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import Dataset, get_worker_info

from hydra_vision.errors import DataError
from hydra_vision.images import READ_ERRORS, ImageRules
from hydra_vision.train.cache import decode_all
from hydra_vision.train.randomness import seed_generators, seeded
from hydra_vision.train.sampling import Draw


class ReadableDataset(Dataset):
    """Wraps a map-style data set: an unreadable image is replaced by the next readable one and remembered.

    What loader processes found is kept in shared memory, so the main process sees it, and an image counts once however
    often it is met. Timm's own data set skips silently and without a limit on their number.

    Also makes augmentation reproducible: its random numbers follow from what the sampler says of each image, so that
    neither the number of loader processes nor an interruption changes them.

    Args:
        dataset: any map-style data set of (PIL image, class index).
        split: what messages call it.
        max_unreadable: how many images may be skipped.
        num_classes: class indices must be below it.
        rules: how images are converted.
        mask_skipped: give the replacement the target -1, so that validation does not count an image twice.
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
        self.transform: Callable[[Image.Image], Any] | None = None  # set by timm's create_loader
        self._bad = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()
        self._decoded: list[np.ndarray | None] | None = None
        self._targets: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def decode_into_memory(self) -> None:
        """Decodes every image once. Loader processes that are forked later share the arrays.

        Raises:
            DataError: too little memory, or more unreadable images than are allowed.
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

        self._decoded = decode_all(decode, len(self), self.split)

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
        target = int(target)
        if not 0 <= target < self.num_classes:
            raise DataError(
                f'{self.name_of(position)} of the {self.split} split has class {target}; the model has '
                f'{self.num_classes} classes (model.num_classes)'
            )
        if not counted or (offset and self.mask_skipped):
            target = -1
        return self._transformed(image, entropy), target

    def unreadable(self) -> list[str]:
        """Names of the images that could not be read so far."""
        return [self.name_of(int(position)) for position in self._bad.nonzero()]

    def add_up(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Takes over what other processes found.

        Args:
            total: sums a tensor over the processes.
        """
        self._bad |= total(self._bad.int()) > 0

    def report(self) -> str:
        """One line on what could not be read."""
        names = self.unreadable()
        shown = ', '.join(names[:5]) + (f' and {len(names) - 5} more' if len(names) > 5 else '')
        noun = 'image' if len(names) == 1 else 'images'
        return (
            f'{len(names)} unreadable {noun} in the {self.split} split: {shown} '
            f'(allowed: data.max_unreadable={self.max_unreadable})'
        )

    def name_of(self, index: int) -> str:
        """File name of an image, or its number where the data set has no names."""
        if isinstance(self.dataset, ImageDataset):
            return str(self.dataset.filename(index))
        samples = getattr(self.dataset, 'samples', None)
        return str(samples[index][0]) if samples is not None else f'image {index}'

    def _mark(self, index: int, error: BaseException) -> None:
        """Remembers an unreadable image; gives up past the limit."""
        self._bad[index] = True
        if int(self._bad.sum()) > self.max_unreadable:
            raise DataError(self.report()) from error

    def _read(self, index: int, lock: 'threading.Lock | None' = None) -> tuple[Image.Image, int]:
        """Image and class of an index.

        Args:
            index: of the wrapped set.
            lock: held while the wrapped set is asked, where threads share it; decoding needs no lock.
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
