"""Noise in place of images, made on the device: measures training speed without a data set and without a loader."""

from collections.abc import Iterator

import torch
from torch.utils.data import Dataset

SYNTHETIC = 'synthetic'
_STEPS = 100  # training steps an epoch where the recipe does not say how many images there are


class SyntheticImages(Dataset):
    """Stands for a set of `length` images; `SyntheticLoader` makes the batches.

    Args:
        length: number of images.
    """

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length


class SyntheticLoader:
    """The same batch of normally distributed pixels and random classes over and over: nothing is to be learned.

    Args:
        dataset: says how many images there are.
        batch_size: images a step of one process.
        world: number of processes.
        input_size: channels, height, width.
        num_classes: classes are drawn below it.
        device: where the batch lies.
        seed: of the batch.
    """

    sampler = None

    def __init__(
        self,
        dataset: SyntheticImages,
        *,
        batch_size: int,
        world: int,
        input_size: tuple[int, int, int],
        num_classes: int,
        device: torch.device,
        seed: int,
    ):
        generator = torch.Generator().manual_seed(seed)
        self.dataset = dataset
        self.steps = max(1, len(dataset) // (batch_size * world))
        self.images = torch.randn(batch_size, *input_size, generator=generator).to(device)
        self.targets = torch.randint(num_classes, (batch_size,), generator=generator).to(device)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(self.steps):
            yield self.images.clone(), self.targets.clone()  # mixup works in place


def synthetic_length(samples: int | None, batch_size: int) -> int:
    """Images of a synthetic split: as many as the recipe says, or enough for a hundred steps."""
    return _STEPS * batch_size if samples is None else samples
