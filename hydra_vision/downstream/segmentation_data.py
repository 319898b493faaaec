"""A folder of images and masks: SPLIT/images/NAME.(jpg|png), SPLIT/masks/NAME.png, optionally classes.txt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from ..errors import UserError

__all__ = ['SegmentationFolder', 'eval_transform', 'read_classes', 'train_transform']

_IMAGES = ('.jpg', '.jpeg', '.png', '.webp')


class SegmentationFolder(Dataset):
    """Pairs of a uint8 image (3, H, W) and a mask (H, W) of class numbers, through a joint transform."""

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        num_classes: int,
        ignore_index: int,
        transform: Optional[v2.Transform] = None,
    ) -> None:
        """
        Args:
            root: the data set.
            split: folder below it.
            num_classes: class numbers are below it.
            ignore_index: number of pixels without a class.
            transform: takes and returns (tv_tensors.Image, tv_tensors.Mask).

        Raises:
            UserError: no such folder, no images, an image without mask or of another size than its mask.
        """
        images, masks = (Path(root) / split / name for name in ('images', 'masks'))
        for folder in (images, masks):
            if not folder.is_dir():
                raise UserError(f'no folder {folder}; wanted: SPLIT/images/NAME.jpg and SPLIT/masks/NAME.png')
        self.images = sorted(path for path in images.iterdir() if path.suffix.lower() in _IMAGES)
        self.masks = [masks / f'{path.stem}.png' for path in self.images]
        if not self.images:
            raise UserError(f'{images} holds no image; wanted: {", ".join(_IMAGES)}')
        self.sizes = set()
        for image, mask in zip(self.images, self.masks):
            if not mask.is_file():
                raise UserError(f'{image} has no mask {mask}')
            with Image.open(image) as a, Image.open(mask) as b:  # headers only
                if a.size != b.size:
                    raise UserError(f'{image} is {a.size[0]} x {a.size[1]}, its mask {b.size[0]} x {b.size[1]} pixels')
                if b.mode not in ('L', 'P', 'I', 'I;16', '1'):
                    raise UserError(f'{mask} has mode {b.mode}; a mask holds one class number a pixel')
                self.sizes.add(a.size)
        self.num_classes, self.ignore_index, self.transform = num_classes, ignore_index, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = tv_tensors.Image(F.pil_to_tensor(Image.open(self.images[i]).convert('RGB')))
        mask = self._mask(i)
        return (image, mask) if self.transform is None else self.transform(image, mask)

    def check_classes(self, count: int = 16) -> None:
        """Look into some masks, spread evenly: a wrong number of classes shows before the work, not at the last split.

        Args:
            count: of masks at least, or all there are.

        Raises:
            UserError: a class number that is not allowed.
        """
        for i in range(0, len(self), max(1, len(self) // count)):
            self._mask(i)

    def _mask(self, i: int) -> tv_tensors.Mask:
        mask = tv_tensors.Mask(F.pil_to_tensor(Image.open(self.masks[i]))[0].long())
        wrong = mask[(mask >= self.num_classes) & (mask != self.ignore_index)]
        if wrong.numel():
            raise UserError(
                f'{self.masks[i]} holds the class {int(wrong[0])}; allowed: 0 to {self.num_classes - 1} and '
                f'{self.ignore_index} (ignored)'
            )
        return mask


def read_classes(root: Path, num_classes: Optional[int]) -> list[str]:
    """Names of the classes: classes.txt, one a line, or 'class 0', ... where only their number was given.

    Raises:
        UserError: neither, or both and they disagree.
    """
    path = Path(root) / 'classes.txt'
    if not path.is_file():
        if num_classes is None:
            raise UserError(f'{path} does not exist; write it, one name a line, or pass --num-classes')
        return [f'class {i}' for i in range(num_classes)]
    names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if num_classes is not None and num_classes != len(names):
        raise UserError(f'--num-classes {num_classes}, but {path} names {len(names)}')
    return names


class _RandomScale(v2.Transform):
    """Both sides times one factor between two. torchvision's ScaleJitter fits the image into the crop first."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        scale = float(torch.empty(()).uniform_(self.low, self.high))
        return {'size': [max(1, round(scale * side)) for side in v2.query_size(flat_inputs)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.resize, inpt, **params, interpolation=InterpolationMode.BILINEAR, antialias=True)


def train_transform(crop: Sequence[int], ignore_index: int) -> v2.Compose:
    """Random scale (0.5 to 2), crop, flip and colours; what a crop reaches beyond the image is ignored.

    Args:
        crop: height and width of the result.
        ignore_index: class number of what is padded.
    """
    height, width = crop
    return v2.Compose(
        [
            _RandomScale(0.5, 2.0),
            v2.RandomCrop(
                (height, width),
                pad_if_needed=True,
                fill={tv_tensors.Image: 0, tv_tensors.Mask: ignore_index},
            ),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4),
            *_normalise(),
        ]
    )


def eval_transform() -> v2.Compose:
    """The whole image, normalised."""
    return v2.Compose(_normalise())


def _normalise() -> list[v2.Transform]:
    return [
        v2.ToDtype({tv_tensors.Image: torch.float32, 'others': None}, scale=True),
        v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        v2.ToPureTensor(),
    ]
