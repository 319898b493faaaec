"""Which images a process reads, in which order: the same for the whole run on any number of processes."""

from collections.abc import Iterator
from typing import NamedTuple

from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Sampler

from ..errors import ConfigError
from .randomness import seed_from


class Draw(NamedTuple):
    """What a sampler asks of a data set.

    Attributes:
        index: Of the image.
        entropy: Integers that seed its augmentation; empty for none.
        counted: False for padding that only fills a batch up: its class is given as -1.
    """

    index: int
    entropy: tuple[int, ...] = ()
    counted: bool = True


class TrainSampler(Sampler[Draw]):
    """The images of one process in an epoch, from an order that all processes share.

    Batch k of an epoch takes images k * G to (k + 1) * G - 1 of the order, where G is the batch size over all
    processes; process r takes every world-th of them, starting with the r-th. So a run sees the same batches with the
    same augmentations on any number of processes, and can be resumed in the middle of an epoch. An incomplete batch at
    the end of the order is dropped.

    Args:
        length: Images in the set.
        batch_size: Images per batch of one process.
        rank: Rank of this process.
        world: Number of processes.
        seed: Seed of the order and of the augmentation.
        repeats: Repeated augmentation (Hoffer et al., arXiv 1901.09335, as in DeiT, arXiv 2012.12877): an epoch takes
            1 / repeats of the images, each `repeats` times, the copies adjacent in the order; timm's
            `RepeatAugSampler`.

    Raises:
        ValueError: Fewer images than one batch over all processes.
    """

    def __init__(self, length: int, *, batch_size: int, rank: int, world: int, seed: int, repeats: int = 1):
        self.batch_size, self.rank, self.world, self.seed = batch_size, rank, world, seed
        self.batches = length // (batch_size * world)
        if self.batches == 0:
            raise ValueError(f'a batch of {batch_size * world} images is more than the {length} of the set')
        self.order = RepeatAugSampler(
            range(length), num_replicas=1, rank=0, num_repeats=repeats, selected_round=0, selected_ratio=1
        )
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch that is read next, and the batch it starts with."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Images of this process in a whole epoch, wherever the next pass starts."""
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[Draw]:
        self.order.set_epoch(seed_from(self.seed, self.epoch))
        order = list(self.order)
        batch = self.batch_size * self.world
        for position in range(self.start * batch + self.rank, self.batches * batch, self.world):
            yield Draw(order[position], (self.seed, self.epoch, position))


class EvalSampler(Sampler[Draw]):
    """Every image once over all processes; processes with one image less are padded with one that is not counted.

    So every process runs the same number of batches, whatever the sizes of set and world, and sums over processes
    are those of the set.

    Args:
        length: Images in the set.
        rank: Rank of this process.
        world: Number of processes.
    """

    def __init__(self, length: int, *, rank: int, world: int):
        self.length, self.rank, self.world = length, rank, world

    def __len__(self) -> int:
        return -(-self.length // self.world)

    def __iter__(self) -> Iterator[Draw]:
        for position in range(self.rank, len(self) * self.world, self.world):
            yield Draw(position) if position < self.length else Draw(0, counted=False)


def local_batch(batch_size: int, world: int, mixes: bool) -> int:
    """Images per batch of one process: its share of data.batch_size.

    Args:
        batch_size: Images per batch over all processes.
        world: Number of processes.
        mixes: Whether mixup or CutMix pairs the images of a batch.

    Raises:
        ConfigError: The processes cannot share it equally.
    """
    if batch_size % world:
        raise ConfigError(
            f'data.batch_size={batch_size} is for all processes together and cannot be shared by {world}; allowed: '
            f'multiples of {world}'
        )
    if mixes and batch_size // world % 2:
        raise ConfigError(
            f'data.batch_size={batch_size} gives {batch_size // world} images to each of {world} processes; mixup and '
            f'cutmix need an even number: multiples of {2 * world}'
        )
    return batch_size // world
