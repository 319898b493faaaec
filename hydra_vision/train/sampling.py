"""Which images a process reads, in which order: the same for the whole run however many processes share it."""

from collections.abc import Iterator
from typing import NamedTuple

from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Sampler

from hydra_vision.errors import ConfigError
from hydra_vision.train.config import Config
from hydra_vision.train.distributed import World
from hydra_vision.train.randomness import seed_from


class Draw(NamedTuple):
    """What a sampler asks of a data set.

    Attributes:
        index: of the image.
        entropy: what the augmentation's random numbers follow from; empty for none.
        counted: False for an image that only fills a batch up: its class is given as -1.
    """

    index: int
    entropy: tuple[int, ...] = ()
    counted: bool = True


class TrainSampler(Sampler[Draw]):
    """The images of one process in an epoch, from an order that all processes share.

    Step k of an epoch takes images k * G to (k + 1) * G - 1 of the order, G being the batch over all processes; process
    r takes every world-th of them from the r-th on. So a run sees the same batches with the same augmentations on any
    number of processes, and can go on in the middle of an epoch. What is left at the end of the order and fills no
    batch is left out.

    Args:
        length: images in the set.
        batch_size: images a step of one process.
        rank: of this process.
        world: number of processes.
        seed: of the order and of the augmentation.
        repeats: repeated augmentation (Hoffer et al., arXiv 1901.09335, as in DeiT, arXiv 2012.12877): an epoch takes
            1 / repeats of the images, each so many times, the copies side by side in the order; timm's
            `RepeatAugSampler`.

    Raises:
        ValueError: fewer images than one batch over all processes.
    """

    def __init__(self, length: int, *, batch_size: int, rank: int, world: int, seed: int, repeats: int = 1):
        self.batch_size, self.rank, self.world, self.seed = batch_size, rank, world, seed
        self.steps = length // (batch_size * world)
        if self.steps == 0:
            raise ValueError(f'a batch of {batch_size * world} images is more than the {length} of the set')
        self.order = RepeatAugSampler(
            range(length), num_replicas=1, rank=0, num_repeats=repeats, selected_round=0, selected_ratio=1
        )
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Chooses the epoch that is read next, from its step `start` on."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Images of this process in a whole epoch, wherever the next pass starts."""
        return self.steps * self.batch_size

    def __iter__(self) -> Iterator[Draw]:
        self.order.set_epoch(seed_from(self.seed, self.epoch))
        order = list(self.order)
        batch = self.batch_size * self.world
        for position in range(self.start * batch + self.rank, self.steps * batch, self.world):
            yield Draw(order[position], (self.seed, self.epoch, position))


class EvalSampler(Sampler[Draw]):
    """Every image once over all processes; processes with one image less fill up with an image that is not counted.

    So every process runs the same number of batches, whatever the sizes of set and world, and sums over processes
    are those of the set.

    Args:
        length: images in the set.
        rank: of this process.
        world: number of processes.
    """

    def __init__(self, length: int, *, rank: int, world: int):
        self.length, self.rank, self.world = length, rank, world

    def __len__(self) -> int:
        return -(-self.length // self.world)

    def __iter__(self) -> Iterator[Draw]:
        for position in range(self.rank, len(self) * self.world, self.world):
            yield Draw(position) if position < self.length else Draw(0, counted=False)


def local_batch(config: Config, world: World) -> int:
    """Images a step of one process: its share of data.batch_size.

    Raises:
        ConfigError: the processes cannot share it equally.
    """
    batch = config.data.batch_size
    if batch % world.size:
        raise ConfigError(
            f'data.batch_size={batch} is for all processes together and cannot be shared by {world.size}; allowed: '
            f'multiples of {world.size}'
        )
    if config.mixes and batch // world.size % 2:
        raise ConfigError(
            f'data.batch_size={batch} gives {batch // world.size} images to each of {world.size} processes; mixup and '
            f'cutmix need an even number: multiples of {2 * world.size}'
        )
    return batch // world.size
