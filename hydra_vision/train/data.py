"""Data sets and loaders of a recipe: timm's, checked before the run starts."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_dataset, create_loader, resolve_data_config
from timm.data.auto_augment import AugmentOp
from timm.data.readers import add_img_extensions
from torch import nn
from torch.utils.data import Dataset, IterableDataset, RandomSampler
from torchvision.datasets.folder import IMG_EXTENSIONS

from hydra_vision.train.config import Config
from hydra_vision.train.errors import ConfigError, DataError
from hydra_vision.train.images import ImageRules
from hydra_vision.train.readable import ReadableDataset

_SYNONYMS = (("train", "training"), ("val", "validation", "valid", "eval", "test"))
DIGITS = "sklearn/digits"


@dataclasses.dataclass
class Split:
    """One part of a data set, and what it is called in messages."""

    dataset: Dataset
    name: str
    classes: list[str] | None  # None where the reader does not know them


def open_splits(config: Config, train: bool = True) -> tuple[Split | None, Split]:
    """Opens the training split (unless `train` is False) and the validation split and checks one against the other.

    Raises:
        DataError: a missing folder, an empty class, splits whose classes differ, a set that its reader refuses.
    """
    val = _open(config, config.data.val_split, is_training=False)
    if not train:
        return None, val
    first = _open(config, config.data.train_split, is_training=True)
    if first.classes is not None and val.classes is not None and first.classes != val.classes:
        missing = sorted(set(first.classes) - set(val.classes))
        extra = sorted(set(val.classes) - set(first.classes))
        parts = [f"{_some(missing)} only in {first.name}"] if missing else []
        parts += [f"{_some(extra)} only in {val.name}"] if extra else []
        raise DataError(
            f"the classes of {first.name} ({len(first.classes)}) and {val.name} ({len(val.classes)}) differ: "
            + ("; ".join(parts) or "their order is not the same")
        )
    return first, val


def count_classes(config: Config, split: Split) -> int:
    """Number of classes for the model: the recipe's, which must agree with the data, or else the data's.

    Raises:
        DataError: the two disagree, or neither is known.
    """
    wanted, found = config.model.num_classes, None if split.classes is None else len(split.classes)
    if wanted is None and found is None:
        raise DataError(f"{split.name} does not say how many classes it has: set model.num_classes")
    if wanted is not None and found is not None and wanted != found:
        raise DataError(
            f"model.num_classes={wanted}, but {split.name} has {found} classes: add --num-classes {found} to train on "
            f"them, or check that the data set is complete"
        )
    return found if wanted is None else wanted


def resolve_input(config: Config, model: nn.Module) -> dict[str, Any]:
    """Input size, mean, std, interpolation and crop: the recipe's where given, the model's own otherwise."""
    data, args = config.data, {"in_chans": config.model.in_chans}
    args |= {key: getattr(data, key) for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
    if data.img_size is not None:
        size = (data.img_size,) * 2 if isinstance(data.img_size, int) else tuple(data.img_size)
        args["input_size"] = (config.model.in_chans, *size)
    resolved = resolve_data_config(args, model=model)
    resolved["input_size"] = (config.model.in_chans, *resolved["input_size"][1:])
    for key in ("mean", "std"):  # a model cfg states three channels whatever the model was built with
        if len(resolved[key]) not in (1, config.model.in_chans):
            resolved[key] = (sum(resolved[key]) / len(resolved[key]),) * config.model.in_chans
    return resolved


def train_loader(config: Config, split: Split, num_classes: int, model: nn.Module, device: torch.device) -> Iterable:
    """Batches of (augmented, normalised images, class indices) on `device`."""
    augment, data = config.augment, config.data
    inputs = resolve_input(config, model)
    dataset = _guard(config, split, num_classes, is_training=True)
    if not isinstance(dataset, IterableDataset) and len(dataset) < data.batch_size:
        raise DataError(f"data.batch_size={data.batch_size} is more than the {len(dataset)} images of {split.name}")
    return _create_loader(
        dataset,
        input_size=inputs["input_size"],
        batch_size=data.batch_size,
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
        mean=inputs["mean"],
        std=inputs["std"],
        **_loader_kwargs(config, device),
    )


def val_loader(config: Config, split: Split, num_classes: int, model: nn.Module, device: torch.device) -> Iterable:
    """Batches of (cropped, normalised images, class indices) on `device`; -1 marks a replaced unreadable image."""
    inputs = resolve_input(config, model)
    return _create_loader(
        _guard(config, split, num_classes, is_training=False),
        input_size=inputs["input_size"],
        batch_size=config.data.val_batch_size or config.data.batch_size,
        is_training=False,
        interpolation=inputs["interpolation"],
        mean=inputs["mean"],
        std=inputs["std"],
        crop_pct=inputs["crop_pct"],
        crop_mode=inputs["crop_mode"],
        **_loader_kwargs(config, device),
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


def start_epoch(config: Config, loader: Iterable, epoch: int) -> None:
    """Fixes order and augmentation of the epoch that is about to be read: they follow from the seed and its number."""
    if hasattr(loader.dataset, "set_epoch"):
        loader.dataset.set_epoch(epoch)
    if isinstance(loader.sampler, RandomSampler):
        loader.sampler.generator.manual_seed(int(np.random.SeedSequence([config.run.seed, epoch]).generate_state(1)[0]))


def _create_loader(dataset: Dataset, **kwargs: Any) -> Iterable:
    """timm's create_loader, its assertions as our errors, its random numbers apart from everybody else's.

    How many numbers a loader draws depends on whether its processes are alive already. Were they taken from the global
    generator, a resumed run would drift away from one that was never interrupted.
    """
    try:
        loader = create_loader(dataset, **kwargs)
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise ConfigError(f"the settings of data or augment are not valid: {error}") from error
    for operation in augment_operations(loader.dataset.transform):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = functools.partial(_posterize, operation.aug_fn)
    loader.loader.generator = torch.Generator()
    if isinstance(loader.sampler, RandomSampler):
        loader.sampler.generator = torch.Generator()
    return loader


def augment_operations(transform: Any) -> Iterator[AugmentOp]:
    """The single operations of the RandAugment or AutoAugment policy inside a transform of timm's, if there is one."""
    for part in getattr(transform, "transforms", ()):
        yield from getattr(part, "ops", ())
        for sub_policy in getattr(part, "policy", ()):
            yield from sub_policy


def _posterize(posterize: Callable[..., Image.Image], image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    """timm keeps 0 bits at the strongest magnitude, a black image; from version 13 on Pillow refuses that."""
    return posterize(image, bits, **kwargs) if bits > 0 else Image.new(image.mode, image.size)


def _loader_kwargs(config: Config, device: torch.device) -> dict[str, Any]:
    workers = config.data.workers
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)
    # The prefetching loader moves uint8 batches and normalises and erases them on the device.
    return {"num_workers": workers, "device": device, "use_prefetcher": True, "pin_memory": device.type == "cuda"}


def _guard(config: Config, split: Split, num_classes: int, is_training: bool) -> Dataset:
    """Streamed sets skip unreadable images on their own; the others get our counted, limited skipping."""
    if isinstance(split.dataset, IterableDataset):
        return split.dataset
    dataset = ReadableDataset(
        split.dataset,
        split=split.name,
        max_unreadable=config.data.max_unreadable,
        num_classes=num_classes,
        rules=image_rules(config),
        mask_skipped=not is_training,
        seed=config.run.seed,
    )
    if config.data.cache == "ram":
        dataset.decode_into_memory()
    return dataset


def image_rules(config: Config) -> ImageRules:
    """How the recipe has image files converted."""
    return ImageRules(
        mode="L" if config.model.in_chans == 1 else "RGB",
        exif_rotation=config.data.exif_rotation,
        convert_unusual=config.data.unusual_images == "convert",
    )


def _open(config: Config, split: str, is_training: bool) -> Split:
    data = config.data
    mode = image_rules(config).mode
    if data.name == DIGITS:
        from hydra_vision.train.digits import Digits

        dataset = Digits(train=is_training)
        return Split(dataset, f"{DIGITS} ({'train' if is_training else 'test'})", dataset.classes)
    if data.name == "":
        root = _split_root(data.dir, split)
        name = str(root)
        add_img_extensions((*IMG_EXTENSIONS, ".gif"))  # timm alone looks for .jpg, .jpeg and .png only
    else:
        root, name = data.dir, f"{data.name} ({split})"
    streamed = data.name.split("/")[0].lower() in ("hfids", "tfds", "wds")
    kwargs = {"input_key": data.input_key, "target_key": data.target_key}
    if not data.name.lower().startswith("torch/"):
        kwargs["input_img_mode"] = mode
    if streamed:
        kwargs["num_samples"] = data.train_samples if is_training else data.val_samples
        kwargs["seed"] = config.run.seed
        kwargs["batch_size"] = data.batch_size if is_training else data.val_batch_size or data.batch_size
    try:
        dataset = create_dataset(
            data.name,
            root=None if root is None else str(root),
            split=split,
            search_split=data.name != "",
            class_map=data.class_map or "",
            is_training=is_training,
            download=data.download,
            **kwargs,
        )
    except ImportError as error:
        raise DataError(f"data.name={data.name!r} needs a package that is not installed: {error}") from error
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise DataError(f"cannot open {name}: {type(error).__name__}: {error}") from error
    classes = _class_names(dataset)
    if data.name == "" and root.is_dir():
        _check_folder(root, dataset.reader.samples)
    return Split(dataset, name, classes)


def _split_root(folder: str | None, split: str) -> Path:
    """Where a split of an image folder lies: a sub-folder or a .tar of that name or a synonym of it."""
    if folder is None:
        raise DataError("no data: give --data-dir PATH (a folder with train/ and val/), or data.name")
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError(f"data.dir={folder!r} is not a folder")
    names = next((group for group in _SYNONYMS if split in group), ())
    candidates = [root / part for name in dict.fromkeys((split, *names)) for part in (name, f"{name}.tar")]
    for path in candidates:
        if path.is_dir() or path.is_file():
            return path
    raise DataError(f"{root} has no {split} split; looked for {', '.join(path.name for path in candidates)}")


def _check_folder(root: Path, samples: list[tuple[str, int]]) -> None:
    """Every class folder must hold an image: timm numbers only those that do, which would shift the other classes."""
    filled = {Path(path).relative_to(root).parts[0] for path, _ in samples}
    empty = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name not in filled and not p.name.startswith("."))
    if empty:
        noun = "class folder" if len(empty) == 1 else "class folders"
        raise DataError(f"{len(empty)} {noun} of {root} without an image: {_some(empty)}")
    loose = [path for path, _ in samples if Path(path).parent == root]
    if loose:
        raise DataError(f"{len(loose)} images of {root} are in no class folder, e.g. {Path(loose[0]).name}")


def _class_names(dataset: Dataset) -> list[str] | None:
    """Class names in index order, where the data set knows them."""
    reader = getattr(dataset, "reader", dataset)
    for key in ("class_to_idx", "class_name_to_idx"):
        mapping = getattr(reader, key, None)
        if mapping:
            return [str(name) for name, _ in sorted(mapping.items(), key=lambda item: item[1])]
    classes = getattr(dataset, "classes", None)
    return [str(name) for name in classes] if classes else None


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
