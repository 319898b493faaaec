"""Where images come from: a folder, a text list, a tar, an open data set. Names first, pixels when asked for."""

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from PIL import Image
from timm.utils.misc import natural_key

from ..errors import FeatureError
from ..images import READ_ERRORS, SUFFIXES, find_images, is_image, leaf_folders, open_image
from ..io import to_path

__all__ = ['Images', 'open_images', 'sample_digest']

DIGITS = {'sklearn/digits/train': True, 'sklearn/digits/test': False}
PHOTOS = 'sklearn/photos'


@dataclass(frozen=True)
class Images:
    """A list of images in a fixed order.

    Args:
        name: What messages call the source.
        paths: A name for each image, unique enough to find it again.
        classes: The class of each image, None where the source has no classes.
        load: Index -> PIL image, not decoded yet where the format allows; may raise `images.READ_ERRORS`. Used
            from loader processes, so it keeps no open file and can be pickled.
    """

    name: str
    paths: Sequence[str]
    classes: Sequence[str] | None
    load: Callable[[int], Image.Image]

    def __len__(self) -> int:
        return len(self.paths)


def open_images(source: str | os.PathLike | Images | Any) -> Images:
    """List the images of a source without reading them.

    Args:
        source: One of

            - a folder, searched recursively; the folder that holds an image is its class (as timm has it; torchvision
              takes the outermost one), unless images lie directly in the source: then there are no classes;
            - a `.tar` of images, or of tars of images, with classes in the same way (a tar inside is a class);
            - a `.txt` list with one path per line, optionally a tab and a class; relative paths start at the list;
            - one image file;
            - 'sklearn/digits/train' or 'sklearn/digits/test', the trainer's built-in images, or 'sklearn/photos', the
              two photographs (427 x 640) that come with scikit-learn;
            - a map-style data set of (PIL image, class index), with `classes` (names) where it has them.

    Raises:
        FeatureError: No such source, no image in it, a tar that is compressed or damaged.
    """
    if isinstance(source, Images):
        return source
    if not isinstance(source, (str, os.PathLike)):
        return _from_dataset(source)
    if str(source) in DIGITS:
        from ..train.sources import Digits

        return _from_dataset(Digits(train=DIGITS[str(source)]), str(source))
    if str(source) == PHOTOS:
        return _photos()
    path = to_path(source, 'images')
    if path.is_dir():
        images = _from_folder(path)
    elif not path.is_file():
        raise FeatureError(
            f'images={str(source)!r} is neither a folder nor a file; allowed: a folder, a .tar, a .txt list of '
            f'paths, an image, {", ".join(DIGITS)}, {PHOTOS}'
        )
    else:
        images = _from_file(path)
    if not len(images):
        raise FeatureError(f'{path} holds no image; file names may end in {", ".join(SUFFIXES)}')
    return images


def sample_digest(images: Images, count: int = 8) -> str:
    """SHA-256 over the pixels of a few images spread over the source: the same for the same images by another path.

    File names do not tell two sources apart: train/cat/0.png and val/cat/0.png are both cat/0.png.
    """
    digest = hashlib.sha256()
    for index in sorted({round(i * (len(images) - 1) / (count - 1)) for i in range(count)}):
        try:
            with images.load(index) as image:
                digest.update(f'{image.mode} {image.size}'.encode() + image.tobytes())
        except READ_ERRORS as error:
            digest.update(type(error).__name__.encode())
    return digest.hexdigest()


def _photos() -> Images:
    from sklearn.datasets import load_sample_images

    photos = load_sample_images()
    names = [f'{PHOTOS}/{os.path.basename(name)}' for name in photos.filenames]
    return Images(PHOTOS, names, None, [Image.fromarray(pixels) for pixels in photos.images].__getitem__)


def _from_folder(folder: Path) -> Images:
    paths = find_images(folder)
    return Images(str(folder), paths, leaf_folders(paths), partial(_open_file, str(folder), paths))


def _from_file(file: Path) -> Images:
    try:
        if file.suffix.lower() == '.txt':
            return _from_list(file)
        with open(file, 'rb') as stream:
            start = stream.read(16)
        if is_image(file.name, lambda: start):
            return Images(str(file), [str(file)], None, partial(_open_file, '', [str(file)]))
        return _from_tar(file)
    except OSError as error:
        raise FeatureError(f'{file} cannot be read: {error.strerror}') from error


def _from_list(file: Path) -> Images:
    paths, classes = [], []
    with open(file, encoding='utf-8', errors='surrogateescape') as lines:
        for line in lines:
            path, _, label = line.rstrip('\r\n').partition('\t')
            if path:
                paths.append(path)
                classes.append(label)
    labelled = sum(map(bool, classes))
    if 0 < labelled < len(paths):
        raise FeatureError(f'{file}: {labelled} of {len(paths)} lines have a class; give each one, or none')
    return Images(str(file), paths, classes if labelled else None, partial(_open_file, str(file.parent), paths))


@dataclass(frozen=True)
class _Member:
    path: str
    offset: int  # bytes from the start of the outer file
    size: int


def _from_tar(file: Path) -> Images:
    try:
        with open(file, 'rb') as stream:
            members = _tar_members(stream, prefix='', start=0)
    except tarfile.TarError as error:
        raise FeatureError(
            f'{file} is no image, .txt list or plain tar ({error}); a compressed tar has to be unpacked first, for '
            'random access'
        ) from error
    members = sorted(members, key=lambda m: (natural_key(m.path), m.path))

    paths = [member.path for member in members]
    return Images(str(file), paths, leaf_folders(paths), partial(_open_member, str(file), members))


def _tar_members(stream: IO[bytes], prefix: str, start: int) -> list[_Member]:
    """Images of a tar and of the tars inside it; reads headers only."""
    members = []
    with tarfile.open(fileobj=stream, mode='r:') as archive:
        for info in archive:
            name = prefix + info.name.removeprefix('./')
            if info.islnk() or info.issym():
                if is_image(name, bytes):
                    raise FeatureError(f'{name} is a link inside of the tar: pack the files (tar --dereference)')
            elif info.isfile() and name.lower().endswith('.tar'):
                inner = archive.extractfile(info)
                members += _tar_members(inner, prefix=name[: -len('.tar')] + '/', start=start + info.offset_data)
            elif info.isfile() and is_image(name, lambda: archive.extractfile(info).read(16)):  # noqa: B023
                members.append(_Member(name, start + info.offset_data, info.size))
    return members


def _from_dataset(dataset: Any, name: str = '') -> Images:
    if not hasattr(dataset, '__getitem__') or not hasattr(dataset, '__len__'):
        raise FeatureError(f'images={type(dataset).__name__} object; allowed: a path or a map-style data set')
    name = name or type(dataset).__name__
    if not len(dataset):
        raise FeatureError(f'{name} holds no image')
    targets, names = getattr(dataset, 'targets', None), getattr(dataset, 'classes', None)
    classes = None
    if targets is not None:
        classes = [str(int(t)) if names is None else str(names[int(t)]) for t in targets]
    return Images(name, [f'{name}/{i:06d}' for i in range(len(dataset))], classes, partial(_open_item, dataset))


# Functions that can be pickled: loader processes are not forked everywhere.


def _open_file(folder: str, paths: Sequence[str], index: int) -> Image.Image:
    return open_image(os.path.join(folder, paths[index]))


def _open_member(file: str, members: Sequence[_Member], index: int) -> Image.Image:
    with open(file, 'rb') as stream:
        stream.seek(members[index].offset)
        return Image.open(io.BytesIO(stream.read(members[index].size)))


def _open_item(dataset: Any, index: int) -> Image.Image:
    return dataset[index][0]
