"""Data sets: folders, archives, parquet, shards and the built-in ones, opened and checked before the run starts."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import ImageDataset, create_dataset
from timm.data.readers import add_img_extensions
from torch.utils.data import Dataset

from ..errors import DataError, first_line
from ..images import SUFFIXES, FolderReader
from ..io import to_path
from .config import DIGITS, PARQUET, SYNTHETIC, Config
from .distributed import World
from .sampling import local_batch

_SYNONYMS = (('train', 'training'), ('val', 'validation', 'valid', 'eval', 'test'))
_SYNTHETIC_BATCHES = 100  # per epoch, where the recipe does not set the number of images
_ALONE = World()


@dataclasses.dataclass
class Split:
    """One split of a data set.

    Attributes:
        dataset: timm's, or a built-in one.
        name: What messages call it.
        classes: Class names in index order, None where the reader does not know them.
        readable: The set with unreadable images skipped, once a loader was built.
    """

    dataset: Dataset
    name: str
    classes: list[str] | None
    readable: Dataset | None = None


class Digits(Dataset):
    """scikit-learn's handwritten digits, the demonstration set: real images that come with the package.

    1,797 grayscale images of 8x8 pixels, ten classes, split 80/20 by a fixed seed with equal class shares. They were
    written by 43 people (UCI "Optical Recognition of Handwritten Digits", its test part).

    Args:
        train: The training part (1,437 images) or the held-out part (360).
    """

    def __init__(self, train: bool):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = (digits.images * (255 / 16)).round().astype(np.uint8)  # stored as 0..16
        parts = train_test_split(np.arange(len(images)), test_size=0.2, random_state=0, stratify=digits.target)
        self.indices = np.sort(parts[0] if train else parts[1])
        self.images, self.targets = images[self.indices], digits.target[self.indices]
        self.classes = [str(name) for name in digits.target_names]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.targets[index])


class SyntheticImages(Dataset):
    """Stands for a set of `length` images; `data.SyntheticLoader` generates the batches.

    Args:
        length: Number of images.
    """

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length


def open_splits(config: Config, train: bool = True, world: World = _ALONE) -> tuple[Split | None, Split]:
    """Open the training split (unless `train` is False) and the validation split and compare their classes.

    Args:
        config: The recipe.
        train: Whether the training split is needed.
        world: The processes that share it.

    Raises:
        DataError: A missing folder, an empty class, splits whose classes differ, a set that its reader rejects.
    """
    val = _open(config, config.data.val_split, is_training=False, world=world)
    if not train:
        return None, val
    first = _open(config, config.data.train_split, is_training=True, world=world)
    if first.classes is not None and val.classes is not None and first.classes != val.classes:
        missing = sorted(set(first.classes) - set(val.classes))
        extra = sorted(set(val.classes) - set(first.classes))
        parts = [f'{_some(missing)} only in {first.name}'] if missing else []
        parts += [f'{_some(extra)} only in {val.name}'] if extra else []
        raise DataError(
            f'the classes of {first.name} ({len(first.classes)}) and {val.name} ({len(val.classes)}) differ: '
            + ('; '.join(parts) or 'their order is not the same')
        )
    return first, val


def check_classes(split: Split, trained: list[str] | None) -> str | None:
    """Compare the classes of a split with those that a checkpoint was trained on.

    Args:
        split: The split that the model is about to be trained or validated on.
        trained: Class names in index order, None where they are not known.

    Returns:
        A warning where all names differ, as in a renamed copy of the set.

    Raises:
        DataError: Another number of classes, or only some names agree, or they agree at other indices.
    """
    if split.classes is None or trained is None or split.classes == trained:
        return None
    if len(split.classes) != len(trained):
        raise DataError(f'{split.name} has {len(split.classes)} classes; the checkpoint has {len(trained)}')
    index = next(i for i, (here, there) in enumerate(zip(split.classes, trained)) if here != there)
    text = f'class {index} of {split.name} is {split.classes[index]!r}, of the checkpoint {trained[index]!r}'
    if set(split.classes) & set(trained):
        raise DataError(f'{text}: it was trained on other classes, or on these in another order')
    return f'warning: {text}: all names differ, the order of the classes is taken to be the same'


def count_classes(config: Config, split: Split) -> int:
    """Number of classes for the model: the recipe's, which must agree with the data, or else the data's.

    Raises:
        DataError: The two disagree, or neither is known.
    """
    wanted, found = config.model.num_classes, None if split.classes is None else len(split.classes)
    if wanted is None and found is None:
        raise DataError(f'{split.name} does not say how many classes it has: set model.num_classes')
    if wanted is not None and found is not None and wanted != found:
        raise DataError(
            f'model.num_classes={wanted}, but {split.name} has {found} classes: add --num-classes {found} to train on '
            f'them, or check that the data set is complete'
        )
    return found if wanted is None else wanted


def _open(config: Config, split: str, is_training: bool, world: World) -> Split:
    data = config.data
    if data.name == SYNTHETIC:
        samples = data.train_samples if is_training else data.val_samples
        return Split(SyntheticImages(samples or _SYNTHETIC_BATCHES * data.batch_size), SYNTHETIC, None)
    if data.name == DIGITS:
        dataset = Digits(train=is_training)
        return Split(dataset, f'{DIGITS} ({"train" if is_training else "test"})', dataset.classes)
    if data.name == '':
        root = _split_root(data.dir, split)
        name = str(root)
        add_img_extensions(SUFFIXES)  # in a .tar; timm alone looks for .jpg, .jpeg and .png only
    else:
        root, name = data.dir, f'{data.name} ({split})'
    if data.class_map is not None:
        _check_class_map(data.class_map)
    _check_package(data.name, data.reader)
    reader = f'hfds/{_parquet_folder(data.dir)}' if data.name == PARQUET else data.name
    root = None if data.name == PARQUET else root
    kwargs = {'input_key': data.input_key, 'target_key': data.target_key}
    if data.reader != 'torch':
        mode = 'L' if config.model.in_chans == 1 else 'RGB'
        kwargs['input_img_mode'] = '' if data.reader in ('hfids', 'wds') else mode  # ReadableStream converts these
    if data.streamed:
        kwargs['num_samples'] = data.train_samples if is_training else data.val_samples
        kwargs['seed'] = config.run.seed
        batch_size = None if is_training else data.val_batch_size
        kwargs['batch_size'] = batch_size or local_batch(data.batch_size, world.size, config.augment.mixes)
    if data.name == '' and root.is_dir():
        suffixes = data.input_key.split(';') if data.input_key else SUFFIXES
        try:
            folder = FolderReader(root, data.class_map or '', suffixes)
        except (OSError, ValueError, AssertionError) as error:  # of timm's reader of class maps
            raise DataError(f'data.class_map={data.class_map!r} cannot be read: {first_line(error)}') from error
        dataset = ImageDataset(str(root), reader=folder, input_img_mode=kwargs['input_img_mode'])
        _check_folder(root, folder.samples, None if data.class_map is None else _class_names(dataset))
        return Split(dataset, name, _class_names(dataset))
    try:
        dataset = create_dataset(
            reader,
            root=None if root is None else str(root),
            split=split,
            search_split=data.name != '',
            class_map=data.class_map or '',
            is_training=is_training,
            download=data.download,
            **kwargs,
        )
    except ImportError as error:
        raise DataError(f'data.name={data.name!r} needs a package that is not installed: {error}') from error
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise DataError(f'cannot open {name}: {type(error).__name__}: {error}') from error
    if data.streamed and not is_training:  # see val_loader
        dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1
    return Split(dataset, name, _class_names(dataset))


def _check_package(name: str, reader: str) -> None:
    """Raise DataError for a reader whose package is missing, before timm prints or raises something of its own."""
    package = {'hfds': 'datasets', 'hfids': 'datasets', PARQUET: 'datasets', 'wds': 'webdataset'}.get(reader)
    if package is not None and importlib.util.find_spec(package) is None:
        raise DataError(f"data.name={name!r} needs the package {package}: pip install 'hydra-vision[data]'")


def _parquet_folder(folder: str | None) -> Path:
    """The folder of parquet files, absolute, so that it is never taken for a name on the Hugging Face Hub."""
    root = None if folder is None else to_path(folder, 'data.dir').resolve()
    if root is None or not root.is_dir() or not any(root.rglob('*.parquet')):
        raise DataError(f'data.dir={folder!r} is not a folder with .parquet files')
    return root


def _split_root(folder: str | None, split: str) -> Path:
    """Path of a split of an image folder: a subfolder or a .tar of that name or a synonym of it."""
    if folder is None:
        raise DataError('no data: give --data-dir PATH (a folder with train/ and val/), or data.name')
    root = to_path(folder, 'data.dir')
    if not root.is_dir():
        raise DataError(f'data.dir={folder!r} is not a folder')
    names = next((group for group in _SYNONYMS if split in group), ())
    candidates = [root / part for name in dict.fromkeys((split, *names)) for part in (name, f'{name}.tar')]
    for path in candidates:
        if path.is_dir() or path.is_file():
            return path
    raise DataError(f'{root} has no {split} split; looked for {", ".join(path.name for path in candidates)}')


def _check_class_map(path: str) -> None:
    """Check for one class name per line: an empty or duplicate one would shift the indices of those after it."""
    if not Path(path).is_file():
        raise DataError(f'data.class_map={path!r} is not a file')
    if Path(path).suffix != '.txt':
        return
    names = [line.strip() for line in Path(path).read_text().splitlines()]
    wrong = next((number for number, name in enumerate(names) if not name or name in names[:number]), None)
    if wrong is not None:
        what = f'{names[wrong]!r} a second time' if names[wrong] else 'no class name'
        raise DataError(f'data.class_map={path!r} has {what} in line {wrong + 1}')


def _check_folder(root: Path, samples: list[tuple[str, int]], mapped: list[str] | None) -> None:
    """Check that every class folder has an image: timm numbers only those that do, which would shift other classes.

    With a class map, only the folders that it names are checked.
    """
    filled = {Path(path).relative_to(root).parts[0] for path, _ in samples}
    folders = [path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith('.')]
    empty = sorted(name for name in folders if name not in filled and (mapped is None or name in mapped))
    if empty:
        noun = 'class folder' if len(empty) == 1 else 'class folders'
        raise DataError(f'{len(empty)} {noun} of {root} without an image: {_some(empty)}')
    loose = [path for path, _ in samples if Path(path).parent == root]
    if loose:
        raise DataError(f'{len(loose)} images of {root} are in no class folder, e.g. {Path(loose[0]).name}')


def _class_names(dataset: Dataset) -> list[str] | None:
    """Class names in index order, where the data set knows them."""
    reader = getattr(dataset, 'reader', dataset)
    for key in ('class_to_idx', 'class_name_to_idx'):
        mapping = getattr(reader, key, None)
        if mapping:
            return [str(name) for name, _ in sorted(mapping.items(), key=lambda item: item[1])]
    classes = getattr(dataset, 'classes', None)
    return [str(name) for name in classes] if classes else None


def _some(names: list[str], limit: int = 5) -> str:
    return ', '.join(names[:limit]) + (f' and {len(names) - limit} more' if len(names) > limit else '')
