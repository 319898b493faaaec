"""Loaders of a recipe: timm's, with our rules for images, our samplers and reproducible draws."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from PIL import Image
from timm.data import Mixup, create_loader, resolve_data_config
from timm.data.auto_augment import AugmentOp
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from hydra_vision.errors import ConfigError, DataError
from hydra_vision.images import ImageRules
from hydra_vision.train.config import Config
from hydra_vision.train.distributed import World, local_processes
from hydra_vision.train.randomness import seed_from, seeded
from hydra_vision.train.readable import ReadableDataset
from hydra_vision.train.sampling import EvalSampler, TrainSampler, local_batch
from hydra_vision.train.signals import outlive_stop
from hydra_vision.train.sources import Split
from hydra_vision.train.stream import ReadableStream
from hydra_vision.train.synthetic import SYNTHETIC, SyntheticLoader

_ALONE = World()


def resolve_input(config: Config, model: nn.Module) -> dict[str, Any]:
    """Input size, mean, std, interpolation and crop: the recipe's where given, the model's own otherwise."""
    data, args = config.data, {'in_chans': config.model.in_chans}
    args |= {key: getattr(data, key) for key in ('mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')}
    if data.img_size is not None:
        size = (data.img_size,) * 2 if isinstance(data.img_size, int) else tuple(data.img_size)
        args['input_size'] = (config.model.in_chans, *size)
    resolved = resolve_data_config(args, model=model)
    resolved['input_size'] = (config.model.in_chans, *resolved['input_size'][1:])
    for key in ('mean', 'std'):  # a model cfg states three channels whatever the model was built with
        if len(resolved[key]) not in (1, config.model.in_chans):
            resolved[key] = (sum(resolved[key]) / len(resolved[key]),) * config.model.in_chans
    return resolved


def at_epoch(config: Config, epoch: int) -> Config:
    """The recipe with the size of training images that data.progressive_sizes gives an epoch, counted from 0."""
    sizes = config.data.progressive_sizes
    if sizes is None:
        return config
    part = min(epoch * len(sizes) // config.schedule.epochs, len(sizes) - 1)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, img_size=sizes[part]))


def train_loader(
    config: Config, split: Split, num_classes: int, model: nn.Module, device: torch.device, world: World = _ALONE
) -> Iterable:
    """Batches of (augmented, normalised images, class indices) on `device`: this process's part of every step.

    Raises:
        DataError: fewer images than a batch.
        ConfigError: settings that the transforms refuse, or that a streamed set cannot follow.
    """
    augment, data = config.augment, config.data
    batch_size = local_batch(config, world)
    inputs = resolve_input(config, model)
    if config.data.name == SYNTHETIC:
        return _synthetic_loader(config, split, num_classes, inputs['input_size'], batch_size, device, world)
    dataset = _guard(config, split, num_classes, is_training=True)
    sampler = None
    if isinstance(dataset, IterableDataset):
        if augment.repeats > 1:
            raise ConfigError(f'augment.repeats={augment.repeats} needs a set with random access; {split.name} streams')
    elif len(dataset) < data.batch_size:
        raise DataError(f'data.batch_size={data.batch_size} is more than the {len(dataset)} images of {split.name}')
    else:
        sampler = TrainSampler(
            len(dataset),
            batch_size=batch_size,
            rank=world.rank,
            world=world.size,
            seed=config.run.seed,
            repeats=augment.repeats,
        )
    return _create_loader(
        dataset,
        sampler,
        rank=world.rank,
        input_size=inputs['input_size'],
        batch_size=batch_size,
        is_training=True,
        re_prob=augment.erase_prob,
        re_mode=augment.erase_mode,
        re_count=augment.erase_count,
        train_crop_mode=augment.crop_mode,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=augment.color_jitter or None,
        auto_augment=augment.auto_augment,
        interpolation=augment.interpolation,
        mean=inputs['mean'],
        std=inputs['std'],
        **_loader_kwargs(config, device),
    )


def val_loader(
    config: Config, split: Split, num_classes: int, model: nn.Module, device: torch.device, world: World = _ALONE
) -> Iterable:
    """Batches of (cropped, normalised images, class indices) on `device`.

    -1 marks an image that is not counted: in place of an unreadable one, or to fill a batch up. Of a set with random
    access every process gets its part; a streamed set is read whole by every process, and `evaluate` shares its batches
    out, as timm's readers would leave out or repeat images.
    """
    inputs = resolve_input(config, model)
    if config.data.name == SYNTHETIC:
        batch_size = config.data.val_batch_size or local_batch(config, world)
        return _synthetic_loader(config, split, num_classes, inputs['input_size'], batch_size, device, world)
    dataset = _guard(config, split, num_classes, is_training=False)
    streamed = isinstance(dataset, IterableDataset)
    return _create_loader(
        dataset,
        None if streamed else EvalSampler(len(dataset), rank=world.rank, world=world.size),
        rank=world.rank,
        input_size=inputs['input_size'],
        batch_size=config.data.val_batch_size or local_batch(config, world),
        is_training=False,
        interpolation=inputs['interpolation'],
        mean=inputs['mean'],
        std=inputs['std'],
        crop_pct=inputs['crop_pct'],
        crop_mode=inputs['crop_mode'],
        **_loader_kwargs(config, device),
    )


def is_streamed(loader: Iterable) -> bool:
    """Whether a loader reads from a set without random access."""
    return isinstance(loader.dataset, IterableDataset)


def shared_batches(loader: Iterable, world: World, lockstep: bool) -> Iterable[tuple]:
    """What this process evaluates of a validation loader.

    Args:
        loader: of `val_loader`.
        world: the processes.
        lockstep: every process must run every batch (sharded models); those of others are not counted.
    """
    if world.size == 1 or not is_streamed(loader):
        return loader
    if not lockstep:
        return itertools.islice(loader, world.rank, None, world.size)
    return (
        (images, targets if number % world.size == world.rank else torch.full_like(targets, -1))
        for number, (images, targets) in enumerate(loader)
    )


def _synthetic_loader(
    config: Config,
    split: Split,
    num_classes: int,
    input_size: tuple[int, int, int],
    batch_size: int,
    device: torch.device,
    world: World,
) -> SyntheticLoader:
    return SyntheticLoader(
        split.dataset,
        batch_size=batch_size,
        world=world.size,
        input_size=input_size,
        num_classes=num_classes,
        device=device,
        seed=seed_from(config.run.seed, world.rank),
    )


def create_mixup(config: Config, num_classes: int) -> Mixup | None:
    """Mixup and CutMix of whole batches on the device they are trained on."""
    augment = config.augment
    if not config.mixes:
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mix_prob,
        switch_prob=augment.mix_switch_prob,
        mode=augment.mix_mode,
        label_smoothing=augment.smoothing,
        num_classes=num_classes,
    )


def epoch_batches(config: Config, loader: Iterable, epoch: int, start: int = 0) -> Iterator[tuple]:
    """The batches of an epoch from the one numbered `start` on.

    Order and augmentation follow from the seed and the epoch. A set with random access begins at once; a streamed set
    is read from its beginning, what was used already is thrown away.
    """
    seed, sampler = config.run.seed, loader.sampler
    if hasattr(loader.dataset, 'set_epoch'):
        loader.dataset.set_epoch(epoch)
    skip = start
    if isinstance(sampler, TrainSampler):
        if start >= sampler.steps:  # nothing is left but the validation; timm 1.0.29 fails on a loader without a batch
            return iter(())
        sampler.set_epoch(epoch, start)
        skip = 0
    if isinstance(getattr(loader, 'random_erasing', None), _SeededErasing):
        loader.random_erasing.start((seed, epoch), start - skip)
    if isinstance(getattr(loader, 'loader', None), DataLoader):  # loader processes of a streamed set are seeded by it
        loader.loader.generator.manual_seed(seed_from(seed, epoch, loader.rank))
    return itertools.islice(loader, skip, None)


def end_processes(loader: Iterable) -> None:
    """Ends the processes that a loader keeps from epoch to epoch: now, and not when Python happens to free it."""
    inner = getattr(loader, 'loader', None)
    iterator = getattr(inner, '_iterator', None)
    if iterator is not None:
        inner._iterator = None
        iterator._shutdown_workers()


class _SeededErasing:
    """timm's random erasing of batches on the device, its draws made to follow from epoch and batch.

    The loader reads a batch ahead, so draws from the global generators would be lost with it in an interruption.
    """

    def __init__(self, erasing: Callable[[torch.Tensor], torch.Tensor], rank: int):
        self.erasing, self.rank = erasing, rank
        self.epoch, self.batch = (0,), 0

    def start(self, epoch: tuple[int, ...], batch: int) -> None:
        """Says which batch comes next."""
        self.epoch, self.batch = epoch, batch

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        with seeded((*self.epoch, self.batch, self.rank), images.device):
            images = self.erasing(images)
        self.batch += 1
        return images


def _create_loader(dataset: Dataset, sampler: Sampler | None, rank: int, **kwargs: Any) -> Iterable:
    """timm's create_loader with our sampler, its assertions as our errors, its draws apart from everybody else's.

    How many numbers a loader draws depends on whether its processes are alive already. Were they taken from the global
    generators, a resumed run would drift away from one that was never interrupted.
    """
    if sampler is None:  # a streamed set: its loader processes start anew, and so are seeded, for every epoch
        kwargs['persistent_workers'] = False
    try:
        loader = create_loader(dataset, **kwargs)
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise ConfigError(f'the settings of data or augment are not valid: {error}') from error
    for operation in augment_operations(loader.dataset.transform):
        if operation.name.startswith('Posterize'):
            operation.aug_fn = functools.partial(_posterize, operation.aug_fn)
    if loader.random_erasing is not None:
        loader.random_erasing = _SeededErasing(loader.random_erasing, rank)
    inner = loader.loader
    if sampler is not None:  # timm chooses the sampler itself
        loader.loader = inner = DataLoader(
            dataset,
            batch_size=inner.batch_size,
            sampler=sampler,
            num_workers=inner.num_workers,
            collate_fn=inner.collate_fn,
            pin_memory=inner.pin_memory,
            drop_last=inner.drop_last,
            worker_init_fn=inner.worker_init_fn,
            persistent_workers=inner.persistent_workers,
        )
    inner.worker_init_fn = functools.partial(outlive_stop, inner.worker_init_fn)
    inner.generator = torch.Generator()
    loader.rank = rank
    return loader


def augment_operations(transform: Any) -> Iterator[AugmentOp]:
    """The single operations of the RandAugment or AutoAugment policy inside a transform of timm's, if there is one."""
    for part in getattr(transform, 'transforms', ()):
        yield from getattr(part, 'ops', ())
        for sub_policy in getattr(part, 'policy', ()):
            yield from sub_policy


def _posterize(posterize: Callable[..., Image.Image], image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    """timm keeps 0 bits at the strongest magnitude, a black image; from version 13 on Pillow refuses that."""
    return posterize(image, bits, **kwargs) if bits > 0 else Image.new(image.mode, image.size)


def _loader_kwargs(config: Config, device: torch.device) -> dict[str, Any]:
    workers = config.data.workers
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
        workers = max(1, min(cores // local_processes(), 16))
    # The prefetching loader moves uint8 batches and normalises and erases them on the device.
    return {'num_workers': workers, 'device': device, 'use_prefetcher': True, 'pin_memory': device.type == 'cuda'}


def _guard(config: Config, split: Split, num_classes: int, is_training: bool) -> Dataset:
    """The set with counted, limited skipping of unreadable images; the same one for every loader of a split."""
    if split.readable is None:
        split.readable = _readable(config, split, num_classes, is_training)
    return split.readable


def _readable(config: Config, split: Split, num_classes: int, is_training: bool) -> Dataset:
    if isinstance(split.dataset, IterableDataset):
        return ReadableStream(
            split.dataset,
            split=split.name,
            max_unreadable=config.data.max_unreadable,
            num_classes=num_classes,
            rules=image_rules(config),
        )
    dataset = ReadableDataset(
        split.dataset,
        split=split.name,
        max_unreadable=config.data.max_unreadable,
        num_classes=num_classes,
        rules=image_rules(config),
        mask_skipped=not is_training,
    )
    if config.data.cache == 'ram':
        dataset.decode_into_memory()
    return dataset


def image_rules(config: Config) -> ImageRules:
    """How the recipe has image files converted."""
    return ImageRules(
        mode='L' if config.model.in_chans == 1 else 'RGB',
        exif_rotation=config.data.exif_rotation,
        convert_unusual=config.data.unusual_images == 'convert',
    )
