"""Drawn pictures with known shapes in them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


def draw(rng: np.random.Generator, size: tuple[int, int], shapes: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Red rectangles (class 1) and blue discs (class 2) on noise.

    Returns:
        image uint8 (H, W, 3), class numbers (H, W), boxes (n, 5) as x0 y0 x1 y1 class.
    """
    height, width = size
    image = rng.integers(90, 130, (height, width, 3), dtype=np.uint8)
    mask = np.zeros(size, dtype=np.uint8)
    boxes = []
    y, x = np.mgrid[:height, :width]
    for n in range(shapes):
        h, w = rng.integers(height // 4, height // 2, 2)
        left = n * width // shapes
        x0 = left + rng.integers(0, max(width // shapes - w, 1))
        y0 = rng.integers(0, height - h)
        label = int(rng.integers(1, 3))
        if label == 1:
            inside = (x >= x0) & (x < x0 + w) & (y >= y0) & (y < y0 + h)
        else:
            h = w = min(h, w)
            inside = (x - x0 - w / 2 + 0.5) ** 2 + (y - y0 - h / 2 + 0.5) ** 2 <= (w / 2) ** 2
        image[inside] = (220, 30, 30) if label == 1 else (30, 30, 220)
        mask[inside] = label
        boxes.append([x0, y0, x0 + w, y0 + h, label])
    return image, mask, np.array(boxes)


@pytest.fixture(scope='session')
def drawn_folder(tmp_path_factory) -> Path:
    """A segmentation data set of drawn pictures, three classes, 255 at the border."""
    root = tmp_path_factory.mktemp('drawn')
    rng = np.random.default_rng(0)
    for split, count in (('train', 16), ('val', 4), ('test', 5)):
        for name in ('images', 'masks'):
            (root / split / name).mkdir(parents=True)
        for i in range(count):
            image, mask, _ = draw(rng, (60, 72))
            mask[:2] = 255
            Image.fromarray(image).save(root / split / 'images' / f'{i}.png')
            Image.fromarray(mask).save(root / split / 'masks' / f'{i}.png')
    (root / 'classes.txt').write_text('ground\nrectangle\ndisc\n')
    return root


@pytest.fixture
def drawn_boxes() -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Four float images (3, 96, 128) with torchvision's targets."""
    rng = np.random.default_rng(1)
    samples = []
    for _ in range(4):
        image, _, boxes = draw(rng, (96, 128))
        boxes = torch.from_numpy(boxes)
        target = {'boxes': boxes[:, :4].float(), 'labels': boxes[:, 4].long()}
        samples.append((torch.from_numpy(image).permute(2, 0, 1).float() / 255, target))
    return samples
