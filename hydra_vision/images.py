"""Image files: which files of a folder are images, and what an image becomes before augmentation.

The same rules hold for training, features, probes, pictures and segmentation.
"""

import dataclasses
import mimetypes
import os
import stat
import struct
import zlib
from collections.abc import Callable, Collection, Sequence

import numpy as np
from PIL import Image, ImageOps
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key

from .errors import DataError

__all__ = [
    'READ_ERRORS',
    'SUFFIXES',
    'FolderReader',
    'ImageRules',
    'find_images',
    'is_image',
    'leaf_folders',
    'open_image',
]

# What Pillow and file systems raise for a file that is truncated, no image, too large to be one, or gone.
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
SUFFIXES = (
    *('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.apng', '.gif', '.webp', '.bmp', '.dib', '.tif', '.tiff'),
    *('.ppm', '.pgm', '.pbm', '.pnm', '.jp2', '.avif', '.heic', '.heif', '.tga', '.ico'),
)
# What JPEG, PNG, GIF, TIFF and JPEG 2000 begin with; WebP and AVIF have theirs at byte 8 and 4.
_SIGNATURES = (b'\xff\xd8\xff', b'\x89PNG\r\n', b'GIF87a', b'GIF89a', b'II*\0', b'MM\0*', b'\0\0\0\x0cjP  ')
_TYPES = mimetypes.MimeTypes()  # of Python alone: the same on every machine


def find_images(folder: str | os.PathLike, suffixes: Collection[str] = SUFFIXES) -> list[str]:
    """The images of a folder and its sub-folders, links followed, in natural order (9 before 10).

    Args:
        folder: The folder.
        suffixes: As for `is_image`. Whether an image can be decoded shows when it is read.

    Returns:
        Paths relative to the folder. A link that leads back to a folder around it adds nothing.

    Raises:
        DataError: The folder or one of its sub-folders cannot be listed: its images would be lost in silence.
    """
    found: list[str] = []
    root = os.fspath(folder)
    todo = [('', frozenset([_identity(root)]))]  # relative path, folders around it
    while todo:
        relative, around = todo.pop()
        where = os.path.join(root, relative) if relative else root
        try:
            with os.scandir(where) as entries:
                for entry in entries:
                    path = os.path.join(relative, entry.name)
                    if _true(entry.is_dir):
                        identity = _identity(entry.path)
                        if identity not in around:
                            todo.append((path, around | {identity}))
                    elif _is_file(entry) and is_image(entry.name, lambda: _start(entry.path), suffixes):  # noqa: B023
                        found.append(path)
        except OSError as error:
            raise DataError(f'{where} cannot be listed: {error.strerror}') from error
    return sorted(found, key=lambda path: (natural_key(path), path))


def is_image(name: str, start: Callable[[], bytes], suffixes: Collection[str] = SUFFIXES) -> bool:
    """Whether a file is an image: by its suffix or, where its name says nothing of what it holds, by its first bytes.

    Args:
        name: Of the file.
        start: Reads its first 16 bytes; called where they decide.
        suffixes: In lower case; with others than the default ones, the suffix alone decides.
    """
    if os.path.splitext(name)[1].lower() in suffixes:
        return True
    if suffixes is not SUFFIXES or _TYPES.guess_type(name)[0] is not None:
        return False
    first = start()
    return first.startswith(_SIGNATURES) or first[8:12] == b'WEBP' or first[4:12] == b'ftypavif'


def leaf_folders(paths: Sequence[str]) -> list[str] | None:
    """The folder that holds each image, which timm takes for its class; None where one lies in no folder."""
    names = [os.path.basename(os.path.dirname(path)) for path in paths]
    return names if all(names) else None


def open_image(path: str | os.PathLike) -> Image.Image:
    """A PIL image, not decoded yet.

    Raises:
        OSError: Not a regular file (reading a pipe would wait for ever), or not an image. Others: see `READ_ERRORS`.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f'{os.fspath(path)} is not a regular file')
    return Image.open(path)


class FolderReader(ReaderImageFolder):
    """timm's reader of class folders with the listing of `find_images`; for `timm.data.ImageDataset(reader=...)`.

    Args:
        root: Folder; the folder that holds an image is its class.
        class_map: File with the class names in index order, as for timm's; '' numbers them in natural order.
        suffixes: As for `find_images`.

    Raises:
        DataError: A folder that cannot be listed, no images.
    """

    def __init__(self, root: str | os.PathLike, class_map: str = '', suffixes: Collection[str] = SUFFIXES) -> None:
        super(ReaderImageFolder, self).__init__()
        self.root = os.fspath(root)
        paths = find_images(root, suffixes)
        labels = [os.path.basename(os.path.dirname(path)) for path in paths]
        if class_map:
            self.class_to_idx = load_class_map(class_map, self.root)
        else:
            self.class_to_idx = {name: i for i, name in enumerate(sorted(set(labels), key=natural_key))}
        self.samples = [
            (os.path.join(self.root, path), self.class_to_idx[label])
            for path, label in zip(paths, labels)
            if label in self.class_to_idx
        ]
        if not self.samples:
            raise DataError(f'{self.root} holds no image')


def _identity(path: str) -> tuple[int, int]:
    """What a folder is by any of its paths."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _true(check: Callable[[], bool]) -> bool:
    """What a check of a directory entry says; False for a link that cannot be followed."""
    try:
        return check()
    except OSError:
        return False


def _is_file(entry: os.DirEntry) -> bool:
    """Whether it is a file or a broken link (an image that cannot be read), not a pipe, a socket or a device."""
    return _true(entry.is_file) or entry.is_symlink()


def _start(path: str) -> bytes:
    try:
        with open(path, 'rb') as file:
            return file.read(16)
    except OSError:
        return b''


@dataclasses.dataclass(frozen=True)
class ImageRules:
    """How images are converted.

    Args:
        mode: PIL mode of the result, 'L' or 'RGB'.
        exif_rotation: Turn an image as its EXIF tag says. timm and torchvision do not.
        convert_unusual: Convert CMYK, 16-bit, palette and transparent images and take the first frame of an animation;
            False makes each of them an unreadable image.
    """

    mode: str = 'RGB'
    exif_rotation: bool = False
    convert_unusual: bool = True

    def apply(self, image: Image.Image) -> Image.Image:
        """The decoded image in `mode`.

        Raises:
            ValueError: Unusual where that is not allowed, or pixels without a defined range (float, 32 bits).
            OSError: Truncated or damaged.
        """
        if not self.convert_unusual:
            _reject_unusual(image)
        if self.exif_rotation:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith('I'):  # 16 bits: Pillow's own conversion clips everything above 255 to white
            image = _eight_bits(image)
        elif image.mode == 'F':
            raise ValueError('floating-point pixels have no defined range')
        elif image.mode == 'P' and isinstance(image.info.get('transparency'), bytes):
            image = image.convert('RGBA')  # the colours behind the transparency, without Pillow's warning
        return image.convert(self.mode)


def _reject_unusual(image: Image.Image) -> None:
    if image.mode not in ('L', 'RGB', '1'):
        raise ValueError(f'mode {image.mode} (data.unusual_images=unreadable)')
    if any(';16' in str(tile[3]) for tile in getattr(image, 'tile', ())):  # opened as mode RGB
        raise ValueError('16 bits (data.unusual_images=unreadable)')
    if getattr(image, 'is_animated', False):
        raise ValueError('an animation (data.unusual_images=unreadable)')


def _eight_bits(image: Image.Image) -> Image.Image:
    """The upper 8 of 16 bits; mode I holds 16-bit PNGs in some versions of Pillow."""
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 0xFFFF:
        raise ValueError(f'pixels of more than 16 bits (mode {image.mode})')
    return Image.fromarray((pixels >> 8).astype(np.uint8))
