"""Models with weights and preprocessing: from runs of the trainer, files, folders, names; never random unasked."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from hydra_vision.cli import main
from hydra_vision.errors import CheckpointError
from hydra_vision.features import FeatureError, load_backbone
from hydra_vision.train.build import create_model
from hydra_vision.train.checkpoint import save_checkpoint
from hydra_vision.train.config import Config

SPLITS = ['sklearn/digits/train', 'sklearn/digits/test']
DIGITS = Path(__file__).resolve().parents[2] / 'weights' / 'hydra_vit_nano_digits'


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder as the trainer leaves it: raw weights, and averaged ones that are all zero in the head."""
    config = Config.from_dict(
        {
            'model': {'name': 'test_hydra_vit', 'in_chans': 1, 'kwargs': {'patch_size': 4}},
            'data': {'name': 'sklearn/digits', 'img_size': 8, 'mean': [0.3], 'std': [0.4], 'crop_pct': 1.0},
        },
        source='test',
    )
    torch.manual_seed(3)
    model = create_model(config, 10)
    raw = model.state_dict()
    averaged = {**raw, 'head.weight': torch.zeros_like(raw['head.weight'])}
    state = {
        'arch': 'test_hydra_vit',
        'config': config.to_dict(),
        'num_classes': 10,
        'classes': list('0123456789'),
        'epoch': 2,
        'best': {'epoch': 2, 'weights': 'EMA'},
        'state_dict': raw,
        'state_dict_ema': averaged,
    }
    folder = tmp_path / 'run'
    folder.mkdir()
    save_checkpoint(folder, {**state, 'best': {'epoch': 2, 'weights': 'raw'}}, is_best=False)
    (folder / 'last.pt').rename(folder / 'raw.pt')
    save_checkpoint(folder, state, is_best=True)
    return folder


def test_a_run_carries_its_recipe(run):
    backbone = load_backbone(checkpoint=run)
    assert backbone.name == 'test_hydra_vit'
    assert backbone.data['input_size'] == (1, 8, 8)
    assert (backbone.data['mean'], backbone.data['std'], backbone.data['crop_pct']) == ((0.3,), (0.4,), 1.0)
    assert backbone.rules.mode == 'L'
    assert backbone.classes == list('0123456789')
    assert not backbone.model.training
    assert not backbone.model.head.weight.any()  # the weights that the best epoch was measured with
    assert load_backbone(checkpoint=run / 'raw.pt').model.head.weight.any()
    (run / 'last.pt').unlink()
    (run / 'raw.pt').rename(run / 'last.pt')  # the best epoch counts, not the last one
    assert not load_backbone(checkpoint=run).model.head.weight.any()
    larger = load_backbone('test_hydra_vit', checkpoint=run / 'best.pt', img_size=(8, 16), data={'crop_pct': 0.5})
    assert larger.img_size == (8, 16)
    assert larger.data['crop_pct'] == 0.5
    assert larger.fingerprint() == backbone.fingerprint() != load_backbone(checkpoint=run / 'last.pt').fingerprint()


@pytest.mark.slow
def test_a_run_of_the_trainer(tmp_path, capsys):
    out = tmp_path / 'run'
    assert main(['train', '--epochs', '1', '--set', 'schedule.warmup_epochs=0', '--output', str(out)]) == 0
    capsys.readouterr()
    assert main(['probe', 'knn', *SPLITS, '--checkpoint', str(out), '--workers', '0', '--device', 'cpu', '--json']) == 0
    result = json.loads(capsys.readouterr().out)
    assert result['model'] == 'hydra_vit_nano'
    assert result['input_size'] == [1, 8, 8]
    assert result['results'][0]['top1'] > 50


def test_a_file_of_weights(tmp_path):
    model = timm.create_model('test_vit', num_classes=3, img_size=64).eval()
    save_file(model.state_dict(), tmp_path / 'w.safetensors')
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'w.pth')
    x = torch.randn(1, 3, 64, 64)
    for name in ('w.safetensors', 'w.pth'):
        backbone = load_backbone('test_vit', checkpoint=tmp_path / name, model_kwargs={'img_size': 64})
        torch.testing.assert_close(backbone.model(x), model(x))
    # at another size, position embeddings are resampled
    assert load_backbone('test_vit', checkpoint=tmp_path / 'w.pth', img_size=96).model(
        torch.randn(1, 3, 96, 96)
    ).shape == (1, 3)


def test_preprocessing_of_one_channel():
    data = load_backbone('test_hydra_vit', random_init=True, model_kwargs={'in_chans': 1}).data
    assert data['input_size'] == (1, 160, 160)
    rgb = load_backbone('test_hydra_vit', random_init=True).data
    for key in ('mean', 'std'):
        assert data[key] == (pytest.approx(sum(rgb[key]) / 3),)


def test_a_saved_folder():
    backbone = load_backbone(f'local-dir:{DIGITS}')
    assert backbone.data['input_size'] == (1, 8, 8)
    assert tuple(backbone.data['mean']) == (0.305,)
    assert backbone.classes == list('0123456789')
    reference = timm.create_model(
        'hydra_vit_nano', depth=4, img_size=8, patch_size=2, in_chans=1, num_classes=10,
        checkpoint_path=str(DIGITS / 'model.safetensors'),
    ).eval()  # fmt: skip
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(backbone.model(x), reference(x))


def test_random_weights_only_when_asked():
    with pytest.raises(FeatureError, match='hydra_vit_tiny has no published weights'):
        load_backbone('hydra_vit_tiny')
    state = torch.get_rng_state()
    a, b, c = (load_backbone('test_hydra_vit', random_init=True, seed=seed).fingerprint() for seed in (0, 0, 1))
    assert a == b != c
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ('name', 'kwargs', 'match'),
    [
        (None, {}, 'no model'),
        ('hydra_vit_tniy', {'random_init': True}, "nearest valid name is 'hydra_vit_tiny'"),
        ('test_hydra_vit', {'checkpoint': 'gone.pt'}, r"'gone\.pt' is no file"),
        ('test_hydra_vit', {'checkpoint': 'gone.pt', 'random_init': True}, 'exclude each other'),
        ('test_hydra_vit', {'random_init': True, 'img_size': 100}, r'\(100, 100\) is no multiple of the \(16, 16\)'),
        ('test_hydra_vit', {'random_init': True, 'img_size': 0}, 'img_size=0'),
        ('test_hydra_vit', {'random_init': True, 'model_kwargs': {'dim': 3}}, 'cannot build test_hydra_vit'),
        ('test_hydra_vit', {'random_init': True, 'device': 'tpu9'}, "device='tpu9' is not available"),
        ('test_hydra_vit', {'random_init': True, 'data': {'scale': 1}}, r"data=\['scale'\]"),
        ('local-dir:gone', {}, 'cannot build local-dir:gone'),
        (f'local-dir:{DIGITS}', {'model_kwargs': {'num_classes': 7}}, 'num_classes=7, but the weights of'),
    ],
)
def test_bad_arguments(name, kwargs, match):
    with pytest.raises((FeatureError, Exception), match=match) as caught:
        load_backbone(name, **kwargs)
    assert type(caught.value).__name__ in ('FeatureError', 'UserError')


def test_bad_checkpoints(run, tmp_path):
    with pytest.raises(FeatureError, match=r"model='test_vit', but .* holds a test_hydra_vit"):
        load_backbone('test_vit', checkpoint=run)
    with pytest.raises(FeatureError, match='the recipe in'):
        load_backbone(checkpoint=run, model_kwargs={'depth': 2})
    with pytest.raises(FeatureError, match='give it as the model, local-dir:'):
        load_backbone('hydra_vit_nano', checkpoint=DIGITS)
    weights = DIGITS / 'model.safetensors'
    with pytest.raises(FeatureError, match='name the model'):
        load_backbone(checkpoint=weights)
    with pytest.raises(FeatureError, match='cannot build hydra_vit_nano'):
        load_backbone('hydra_vit_nano', checkpoint=weights)
    save_file(timm.create_model('test_vit').state_dict(), tmp_path / 'vit.safetensors')
    with pytest.raises(FeatureError, match=r'do not fit test_hydra_vit with .*; tensors: .* missing'):
        load_backbone('test_hydra_vit', checkpoint=tmp_path / 'vit.safetensors')
    shape = dict(depth=4, img_size=8, patch_size=2, in_chans=1)
    with pytest.raises(FeatureError, match=r'num_classes=7, but the head in .* has 10 classes'):
        load_backbone('hydra_vit_nano', checkpoint=weights, model_kwargs={**shape, 'num_classes': 7})
    for name in ('a.safetensors', 'a.pth'):
        (tmp_path / name).write_bytes(b'no weights at all')
        with pytest.raises(CheckpointError, match='is a text file'):
            load_backbone('test_hydra_vit', checkpoint=tmp_path / name)
