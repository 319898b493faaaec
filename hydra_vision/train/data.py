"""Loaders of a recipe: timm's transforms and prefetcher, with our rules for images, samplers and reproducible draws."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from PIL import Image
from timm.data import Mixup, create_transform, resolve_data_config
from timm.data.auto_augment import AugmentOp
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.naflex_dataset import NaFlexCollator
from timm.data.naflex_loader import NaFlexPrefetchLoader
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ..device import worker_count
from ..errors import ConfigError, DataError, first_line
from ..images import ImageRules
from .config import SYNTHETIC, AugmentConfig, Config
from .distributed import World, local_processes
from .randomness import seed_from, seeded
from .readable import ReadableDataset, ReadableStream
from .sampling import EvalSampler, TrainSampler, local_batch
from .signals import survive_stop
from .sources import Split, SyntheticImages

_ALONE = World()

Images = torch.Tensor | dict[str, Any]  # (B, C, H, W), or timm's NaFlex batch of patches


def resolve_input(config: Config, model: nn.Module) -> dict[str, Any]:
    """Input size, mean, std, interpolation and crop: the recipe's where given, the model's own otherwise."""
    data, args = config.data, {'in_chans': config.model.in_chans}
    args |= {key: getattr(data, key) for key in ('mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')}
    if data.img_size is not None:
        size = (data.img_size,) * 2 if isinstance(data.img_size, int) else tuple(data.img_size)
        args['input_size'] = (config.model.in_chans, *size)
    resolved = resolve_data_config(args, model=model)
    resolved['input_size'] = (config.model.in_chans, *resolved['input_size'][1:])
    if data.naflex_seq_len is not None:
        resolved['sequence'] = {'max_seq_len': data.naflex_seq_len, 'patch_size': tuple(model.patch_embed.patch_size)}
    for key in ('mean', 'std'):  # a model cfg states three channels whatever the model was built with
        if len(resolved[key]) not in (1, config.model.in_chans):
            resolved[key] = (sum(resolved[key]) / len(resolved[key]),) * config.model.in_chans
    return resolved


def image_rules(config: Config) -> ImageRules:
    """How the recipe converts image files."""
    return ImageRules(
        mode='L' if config.model.in_chans == 1 else 'RGB',
        exif_rotation=config.data.exif_rotation,
        convert_unusual=config.data.unusual_images == 'convert',
    )


def create_mixup(augment: AugmentConfig, num_classes: int) -> Mixup | None:
    """Mixup and CutMix of whole batches on the device they are trained on."""
    if not augment.mixes:
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


# Loaders


def train_loader(
    config: Config, split: Split, num_classes: int, model: nn.Module, device: torch.device, world: World = _ALONE
) -> Iterable:
    """Batches of (augmented, normalized images, class indices) on `device`: the share of this process.

    Args:
        config: The recipe.
        split: The training split.
        num_classes: Class indices must be below it.
        model: Decides on input size and normalization where the recipe does not.
        device: Where the batches go.
        world: The processes that share every batch.

    Raises:
        DataError: Fewer images than a batch.
        ConfigError: Settings that the transforms reject, or that a streamed set cannot follow.
    """
    augment = config.augment
    batch_size = local_batch(config.data.batch_size, world.size, augment.mixes)
    inputs = resolve_input(config, model)
    if config.data.name == SYNTHETIC:
        size, seed = inputs['input_size'], config.run.seed
        return SyntheticLoader(split.dataset, batch_size, size, num_classes, device, world, seed)
    dataset = _readable(config, split, num_classes, is_training=True)
    sampler = None
    if isinstance(dataset, IterableDataset):
        if augment.repeats > 1:
            raise ConfigError(f'augment.repeats={augment.repeats} needs a set with random access; {split.name} streams')
    elif len(dataset) < config.data.batch_size:
        raise DataError(
            f'data.batch_size={config.data.batch_size} is more than the {len(dataset)} images of {split.name}'
        )
    else:
        sampler = TrainSampler(
            len(dataset),
            batch_size=batch_size,
            rank=world.rank,
            world=world.size,
            seed=config.run.seed,
            repeats=augment.repeats,
        )
    dataset.transform = _transform(
        inputs,
        is_training=True,
        train_crop_mode=augment.crop_mode,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=augment.color_jitter or None,
        auto_augment=augment.auto_augment,
        interpolation=augment.interpolation,
    )
    erasing = {'re_prob': augment.erase_prob, 're_mode': augment.erase_mode, 're_count': augment.erase_count}
    return _loader(dataset, sampler, inputs, batch_size, config.data.workers, device, world.rank, erasing)


def val_loader(
    config: Config, split: Split, num_classes: int, model: nn.Module, device: torch.device, world: World = _ALONE
) -> Iterable:
    """Batches of (cropped, normalized images, class indices) on `device`.

    -1 marks an image that is not counted: in place of an unreadable one, or as padding. With random access every
    process gets its share; a streamed set is read whole by every process, and `shared_batches` distributes its batches,
    as timm's readers would skip or repeat images.

    Args:
        config: The recipe.
        split: The validation split.
        num_classes: Class indices must be below it.
        model: Decides on input size, normalization and crop where the recipe does not.
        device: Where the batches go.
        world: The processes that share the images.
    """
    inputs = resolve_input(config, model)
    batch_size = config.data.val_batch_size
    batch_size = batch_size or local_batch(config.data.batch_size, world.size, config.augment.mixes)
    if config.data.name == SYNTHETIC:
        size, seed = inputs['input_size'], config.run.seed
        return SyntheticLoader(split.dataset, batch_size, size, num_classes, device, world, seed)
    dataset = _readable(config, split, num_classes, is_training=False)
    streamed = isinstance(dataset, IterableDataset)
    sampler = None if streamed else EvalSampler(len(dataset), rank=world.rank, world=world.size)
    crop = {key: inputs[key] for key in ('interpolation', 'crop_pct', 'crop_mode')}
    dataset.transform = _transform(inputs, is_training=False, **crop)
    return _loader(dataset, sampler, inputs, batch_size, config.data.workers, device, world.rank)


def _transform(inputs: dict[str, Any], **kwargs: Any) -> Callable:
    """timm's transform, its assertions raised as ConfigError."""
    if 'sequence' in inputs:
        kwargs |= {'naflex': True, 'patchify': True, **inputs['sequence']}
    try:
        transform = create_transform(
            inputs['input_size'], mean=inputs['mean'], std=inputs['std'], use_prefetcher=True, **kwargs
        )
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise ConfigError(f'the settings of data or augment are not valid: {error}') from error
    for operation in augment_operations(transform):
        if operation.name.startswith('Posterize'):
            operation.aug_fn = functools.partial(_posterize, operation.aug_fn)
    return transform


def _loader(
    dataset: Dataset,
    sampler: Sampler | None,
    inputs: dict[str, Any],
    batch_size: int,
    workers: int | None,
    device: torch.device,
    rank: int,
    erasing: dict[str, Any] | None = None,
) -> PrefetchLoader:
    """A loader of uint8 batches that timm's prefetcher normalizes, and erases regions of, on the device.

    How many numbers a loader draws depends on whether its processes are alive already. If they came from the global
    generators, a resumed run would drift away from one that was never interrupted.
    """
    workers = worker_count(workers, local_processes())
    if sampler is None:
        dataset.set_loader_cfg(num_workers=workers)
    sequence = inputs.get('sequence')
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=fast_collate if sequence is None else NaFlexCollator(sequence['max_seq_len']),
        pin_memory=device.type == 'cuda',
        drop_last=erasing is not None,  # training
        worker_init_fn=survive_stop,
        # The loader processes of a streamed set are restarted, and so seeded, for every epoch.
        persistent_workers=workers > 0 and sampler is not None,
        generator=torch.Generator(),
    )
    prefetcher = (PrefetchLoader if sequence is None else NaFlexPrefetchLoader)(
        loader,
        mean=inputs['mean'],
        std=inputs['std'],
        channels=inputs['input_size'][0],
        device=device,
        **(erasing or {}),
    )
    if prefetcher.random_erasing is not None:
        prefetcher.random_erasing = _SeededErasing(prefetcher.random_erasing, rank)
    prefetcher.rank = rank
    return prefetcher


def _readable(config: Config, split: Split, num_classes: int, is_training: bool) -> Dataset:
    """The set with counted, limited skipping of unreadable images; the same one for every loader of a split."""
    if split.readable is not None:
        return split.readable
    options = {'split': split.name, 'max_unreadable': config.data.max_unreadable, 'num_classes': num_classes}
    if isinstance(split.dataset, IterableDataset):
        split.readable = ReadableStream(split.dataset, rules=image_rules(config), **options)
    else:
        dataset = ReadableDataset(split.dataset, rules=image_rules(config), mask_skipped=not is_training, **options)
        if config.data.cache == 'ram':
            dataset.decode_into_memory()
        split.readable = dataset
    return split.readable


class SyntheticLoader:
    """Repeats one batch of normally distributed pixels and random classes, to measure training without a loader.

    Args:
        dataset: Sets the number of images.
        batch_size: Images per batch of one process.
        input_size: Channels, height, width.
        num_classes: Classes are drawn below it.
        device: Where the batch lies.
        world: The processes.
        seed: Of the run.
    """

    sampler = None

    def __init__(
        self,
        dataset: SyntheticImages,
        batch_size: int,
        input_size: tuple[int, int, int],
        num_classes: int,
        device: torch.device,
        world: World,
        seed: int,
    ):
        generator = torch.Generator().manual_seed(seed_from(seed, world.rank))
        self.dataset = dataset
        self.batches = max(1, len(dataset) // (batch_size * world.size))
        self.images = torch.randn(batch_size, *input_size, generator=generator).to(device)
        self.targets = torch.randint(num_classes, (batch_size,), generator=generator).to(device)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(self.batches):
            yield self.images.clone(), self.targets.clone()  # mixup works in place


# Reading them


def first_images(images: Images, count: int) -> Images:
    """The first images of a batch."""
    if isinstance(images, dict):
        return {key: t[:count] if isinstance(t, torch.Tensor) else t for key, t in images.items()}
    return images[:count]


def epoch_batches(loader: Iterable, seed: int, epoch: int, start: int = 0) -> Iterator[tuple]:
    """The batches of an epoch from the one numbered `start` on.

    Order and augmentation follow from the seed and the epoch. A set with random access starts there at once; a streamed
    set is read from its beginning, and the batches before `start` are discarded.

    Args:
        loader: Of `train_loader`.
        seed: Seed of the run.
        epoch: Counted from 0.
        start: First batch.
    """
    sampler = loader.sampler
    if hasattr(loader.dataset, 'set_epoch'):
        loader.dataset.set_epoch(epoch)
    skip = start
    if isinstance(sampler, TrainSampler):
        if start >= sampler.batches:  # only the validation is left: do not start the loader processes
            return iter(())
        sampler.set_epoch(epoch, start)
        skip = 0
    if isinstance(getattr(loader, 'random_erasing', None), _SeededErasing):
        loader.random_erasing.start((seed, epoch), start - skip)
    if isinstance(loader, (PrefetchLoader, NaFlexPrefetchLoader)):  # it seeds the loader processes of a streamed set
        loader.loader.generator.manual_seed(seed_from(seed, epoch, loader.rank))
    return itertools.islice(loader, skip, None)


def is_streamed(loader: Iterable) -> bool:
    """Whether a loader reads from a set without random access."""
    return isinstance(loader.dataset, IterableDataset)


def shared_batches(loader: Iterable, world: World, lockstep: bool) -> Iterable[tuple]:
    """The batches of a validation loader that this process evaluates.

    Args:
        loader: Of `val_loader`.
        world: The processes.
        lockstep: Every process must run every batch (sharded models); those of others are not counted.
    """
    if world.size == 1 or not is_streamed(loader):
        return loader
    if not lockstep:
        return itertools.islice(loader, world.rank, None, world.size)
    return (
        (images, targets if number % world.size == world.rank else torch.full_like(targets, -1))
        for number, (images, targets) in enumerate(loader)
    )


def end_processes(loader: Iterable) -> None:
    """End the processes that a loader keeps from epoch to epoch now, and not when Python happens to free it."""
    inner = getattr(loader, 'loader', None)
    iterator = getattr(inner, '_iterator', None)
    if iterator is not None:
        inner._iterator = None
        iterator._shutdown_workers()


def loader_death(error: RuntimeError) -> DataError | None:
    """The error for the user when a loader process has died; None for another error.

    PyTorch raises it wherever the main process happens to be.
    """
    text = first_line(error)
    if 'DataLoader worker' not in text:
        return None
    return DataError(
        f'a loader process died ({text}): often too little memory (fewer --workers need less) or shared memory (in a '
        f'container: a larger --shm-size); the same command with --resume auto continues from the last checkpoint'
    )


class _SeededErasing:
    """timm's random erasing of batches on the device, with draws that follow from epoch and batch.

    The loader reads a batch ahead, so draws from the global generators would be lost with it in an interruption.
    """

    def __init__(self, erasing: Callable[[torch.Tensor], torch.Tensor], rank: int):
        self.erasing, self.rank = erasing, rank
        self.epoch, self.batch = (0,), 0

    def start(self, epoch: tuple[int, ...], batch: int) -> None:
        """Set the batch that comes next."""
        self.epoch, self.batch = epoch, batch

    def __call__(self, images: torch.Tensor, **patches: torch.Tensor) -> torch.Tensor:
        with seeded((*self.epoch, self.batch, self.rank), images.device):
            images = self.erasing(images, **patches)
        self.batch += 1
        return images


def augment_operations(transform: Any) -> Iterator[AugmentOp]:
    """The single operations of the RandAugment or AutoAugment policy inside a timm transform, if there is one."""
    for part in getattr(transform, 'transforms', ()):
        yield from getattr(part, 'ops', ())
        for sub_policy in getattr(part, 'policy', ()):
            yield from sub_policy


def _posterize(posterize: Callable[..., Image.Image], image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    """timm keeps 0 bits at the strongest magnitude, a black image; since version 13 Pillow rejects that."""
    return posterize(image, bits, **kwargs) if bits > 0 else Image.new(image.mode, image.size)
