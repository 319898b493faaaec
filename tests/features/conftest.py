"""Small image folders, and the small trained checkpoint of the repository as a model."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hydra_vision.features import load_backbone


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twelve images in three classes, of several sizes and formats; file numbers of one and two digits."""
    rng = np.random.default_rng(0)
    root = tmp_path / 'images'
    for i in range(12):
        path = root / 'abc'[i % 3] / f'image{i}.{("png", "jpg")[i % 2]}'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i, 40, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture
def tar(folder, tmp_path) -> Path:
    path = tmp_path / 'images.tar'
    with tarfile.open(path, 'w') as archive:
        archive.add(folder, arcname='.')
    return path


@pytest.fixture(scope='session')
def backbone():
    return load_backbone('test_hydra_vit', random_init=True, img_size=32)
