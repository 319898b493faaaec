"""What an image file becomes before augmentation: 8 bits, grey or RGB, as the recipe says."""

import dataclasses
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps

# What Pillow and file systems raise for a file that is truncated, no image, too large to be one, or gone.
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


@dataclasses.dataclass(frozen=True)
class ImageRules:
    """How images are converted.

    Args:
        mode: PIL mode of the result, 'L' or 'RGB'.
        exif_rotation: turn an image as its EXIF tag says. timm and torchvision do not.
        convert_unusual: convert CMYK, 16-bit, palette and transparent images and take the first frame of an animation;
            False makes each of them an unreadable image.
    """

    mode: str = 'RGB'
    exif_rotation: bool = False
    convert_unusual: bool = True

    def apply(self, image: Image.Image) -> Image.Image:
        """The decoded image in `mode`.

        Raises:
            ValueError: unusual where that is not allowed, or pixels without a defined range (float, 32 bits).
            OSError: truncated or damaged.
        """
        if not self.convert_unusual:
            _refuse_unusual(image)
        if self.exif_rotation:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith('I'):  # 16 bits: Pillow's own conversion clips everything above 255 to white
            image = _eight_bits(image)
        elif image.mode == 'F':
            raise ValueError('floating-point pixels have no defined range')
        elif image.mode == 'P' and isinstance(image.info.get('transparency'), bytes):
            image = image.convert('RGBA')  # the colours behind the transparency, without Pillow's warning
        return image.convert(self.mode)


def _refuse_unusual(image: Image.Image) -> None:
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
