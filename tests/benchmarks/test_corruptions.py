import csv

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.corruptions import Corrupted, main
from hydra_vision.errors import UserError
from hydra_vision.features import load_backbone, open_images

pytest.importorskip('imagecorruptions')  # pip install imagecorruptions-imaug
OPTIONS = ['--model', 'test_hydra_vit', '--random-init', '--model-kwargs', 'num_classes=2', '--workers', '0']


@pytest.fixture
def pets(tmp_path):
    """Two classes that a mean tells apart."""
    for name, tone in (('dark', 60), ('light', 190)):
        (tmp_path / 'pets' / name).mkdir(parents=True)
        for i in range(2):
            pixels = np.random.default_rng(i).normal(tone, 20, (48, 48, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'pets' / name / f'{i}.png')
    return tmp_path / 'pets'


def test_every_strength_is_measured(pets, tmp_path):
    chosen = ['--corruptions', 'contrast', 'gaussian_noise']
    assert main([str(pets), *OPTIONS, '--img-size', '32', *chosen, '--output', str(tmp_path / 'out')]) == 0
    with (tmp_path / 'out' / 'corruptions.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['corruption'] for row in rows] == ['none', 'contrast', 'gaussian_noise', 'mean of all']
    assert all(0 <= float(row[f'strength_{s}']) <= 100 for row in rows[1:3] for s in range(1, 6))


def test_images_are_corrupted_as_the_model_takes_them(pets):
    backbone = load_backbone('test_hydra_vit', random_init=True, img_size=32)
    samples = [(open_images(pets).load, i, 0) for i in range(4)]
    clean = Corrupted(samples, backbone, None)[2][0]
    assert torch.allclose(clean, backbone.transform()(Image.open(pets / 'light' / '0.png')), atol=1e-5)
    weak, strong, again = (Corrupted(samples, backbone, 'gaussian_noise', s)[2][0] - clean for s in (1, 5, 5))
    assert 0 < weak.abs().mean() < strong.abs().mean()
    assert torch.equal(strong, again)


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        (['--corruptions', 'rain'], r"--corruptions 'rain'; allowed: gaussian_noise"),
        (['--img-size', '16'], r'3 x 16 x 16; the corruptions need RGB of 32 px'),
        (['--model-kwargs', 'num_classes=3'], r'2 classes, the head 3'),
    ],
)
def test_bad_input(pets, tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        main([str(pets), *OPTIONS, *given, '--output', str(tmp_path / 'out')])
