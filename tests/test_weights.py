"""The checkpoints in weights/ and the pretrained weights by tag do what their model cards say."""

import json
import os
import re
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import hydra_vision
from hydra_vision import save_pretrained
from hydra_vision.images import FolderReader
from hydra_vision.train.sources import Digits
from hydra_vision.weights import write_tensors

FOLDER = Path(__file__).resolve().parents[1] / 'weights' / 'hydra_vit_nano_digits'


def test_digits_card(monkeypatch):
    card = (FOLDER / 'README.md').read_text()
    monkeypatch.chdir(FOLDER.parents[1])
    namespace = {}
    exec(re.search(r'```python\n(.*?)```', card, flags=re.DOTALL)[1], namespace)

    held_out = Digits(train=False)
    x = torch.from_numpy(np.stack([np.asarray(image) for image, _ in held_out])).float() / 255
    with torch.no_grad():
        predicted = namespace['model']((x[:, None] - 0.305) / 0.376).argmax(1)
    right = int((predicted == torch.as_tensor(held_out.targets)).sum())
    stated = int(re.search(r'\((\d+) of 360\)', card)[1])
    assert abs(right - stated) <= 1  # rounding differs between machines
    assert os.path.getsize(FOLDER / 'model.safetensors') < 2 * 1024**2


PRETRAINED = Path(hydra_vision.__file__).parent / 'pretrained'
CHECKS = sorted(PRETRAINED.glob('*/check.json'))  # one next to every file of weights, written when it was


def pretrained(check):
    return timm.create_model('.'.join(check.parent.name.rsplit('_', 1)), pretrained=True).eval()


@pytest.fixture
def weights(tmp_path):
    """A file in place of the trained one: half precision, as that is."""
    torch.manual_seed(0)
    model = timm.create_model('hydra_vit_tiny.tin200', depth=1).eval()
    file = tmp_path / 'model.safetensors'
    write_tensors({key: value.half() for key, value in model.state_dict().items()}, file)
    return model, {'file': str(file)}


def test_weights_by_tag(weights):
    model, overlay = weights
    x = torch.randn(2, 3, 64, 64)
    loaded = timm.create_model('hydra_vit_tiny.tin200', pretrained=True, pretrained_cfg_overlay=overlay, depth=1).eval()
    torch.testing.assert_close(loaded(x), model(x), atol=2e-3, rtol=0)
    changed = timm.create_model(
        *('hydra_vit_tiny.tin200', True),
        pretrained_cfg_overlay=overlay,
        depth=1,
        num_classes=7,
        img_size=96,
        in_chans=1,
    )
    assert changed(x[:, :1].repeat(1, 1, 2, 2)[..., :96, :96]).shape == (2, 7)
    mixer = 'blocks.0.mixer.in_proj.weight'
    assert torch.equal(changed.state_dict()[mixer], loaded.state_dict()[mixer])


def test_weights_by_tag_survive_saving(weights, tmp_path):
    loaded = timm.create_model('hydra_vit_tiny.tin200', True, pretrained_cfg_overlay=weights[1], depth=1).eval()
    save_pretrained(loaded, tmp_path / 'saved', model_args={'depth': 1})
    again = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), loaded(x))
    assert tuple(again.pretrained_cfg['mean']) == loaded.pretrained_cfg['mean']


def test_tags():
    there = (PRETRAINED / 'hydra_vit_tiny_tin200' / 'model.safetensors').exists()
    assert ('hydra_vit_tiny.tin200' in timm.list_pretrained('hydra*')) == there
    cfg = timm.get_pretrained_cfg('hydra_vit_tiny.tin200')
    assert (cfg.num_classes, cfg.input_size, cfg.crop_pct) == (200, (3, 64, 64), 1.0)
    plain = timm.create_model('hydra_vit_tiny', device='meta')  # the model for 224 px stays the default
    assert (plain.num_classes, plain.patch_embed.grid_size) == (1000, (14, 14))
    overlay = {'file': '/nowhere/model.safetensors'}
    with pytest.raises(FileNotFoundError, match=r'hydra_vit_tiny\.tin200 are not where they belong: /nowhere'):
        timm.create_model('hydra_vit_tiny.tin200', pretrained=True, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize('check', CHECKS, ids=lambda path: path.parent.name)
def test_pretrained_logits(check):
    model, stated = pretrained(check), json.loads(check.read_text())
    with torch.no_grad():
        logits = model(synthetic_images(model.pretrained_cfg['input_size']))
    torch.testing.assert_close(logits[:, :5], torch.tensor(stated['logits']), atol=1e-2, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get('TIN200'), reason='TIN200: folder of Tiny-ImageNet-200 with val/ as an ImageFolder'
)
@pytest.mark.parametrize('check', CHECKS, ids=lambda path: path.parent.name)
def test_pretrained_accuracy(check):
    """Top-1 of the first two files of every class, by name."""
    model, stated = pretrained(check), json.loads(check.read_text())
    reader = FolderReader(Path(os.environ['TIN200']) / 'val')
    first = [sample for _, group in groupby(sorted(reader.samples), key=lambda s: s[1]) for sample in islice(group, 2)]
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    right = 0
    with torch.no_grad():
        for start in range(0, len(first), 50):
            part = first[start : start + 50]
            x = torch.stack([transform(Image.open(path).convert('RGB')) for path, _ in part])
            right += int((model(x).argmax(1) == torch.tensor([label for _, label in part])).sum())
    assert len(first) == stated['sample']
    assert abs(right - stated['sample_right']) <= 2  # rounding differs between machines


def synthetic_images(size):
    """Four smooth images (4, C, H, W) of values in -1..1, the same on every machine."""
    channels, height, width = size
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing='ij')
    waves = [torch.sin(3 * (i + 1) * x + 2 * (c + 1) * y + i) for i in range(4) for c in range(channels)]
    return torch.stack(waves).reshape(4, channels, height, width)
