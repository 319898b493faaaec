"""Saved folders: what timm and transformers open is bitwise the model that was saved."""

import json
import os
import stat
import subprocess
import sys
from typing import ClassVar

import pytest
import timm
import torch
from torch import nn

import hydra_vision
from hydra_vision import save_pretrained

VARIANTS = [
    dict(num_classes=5),
    dict(num_classes=5, img_size=96, in_chans=1, patch_size=8, depth=2, pos_embed='learn'),
    dict(num_classes=3, img_size=(32, 64), class_token=True, class_token_position='middle', global_pool='token'),
    dict(num_classes=0, mlp_ratio=2.0, d_state=16, share_bc=True, dynamic_img_size=True),
    dict(num_classes=4, learnable_init_states=True, dt_limit=(0.01, float('inf')), d_conv=3, drop_path_rate=0.1),
    dict(num_classes=4, scan_order='hilbert', mixer='cauchy', mixer_kwargs=dict(qk_dim=4), depth=2),
    dict(num_classes=4, mixer='dft', mlp='blockdiag', mlp_ratio=2.0, depth=2),
]


def create(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model('test_hydra_vit', **kwargs).eval()
    for p in model.parameters():  # nothing at its initial value
        nn.init.normal_(p, std=0.1)
    return model


def images(model: nn.Module) -> torch.Tensor:
    return torch.randn(2, model.in_chans, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


def read_config(folder) -> dict:
    return json.loads((folder / 'config.json').read_text())


@pytest.mark.parametrize('kwargs', VARIANTS)
def test_timm_round_trip(tmp_path, kwargs):
    model = create(**kwargs)
    save_pretrained(model, tmp_path / 'm')
    again = timm.create_model(f'local-dir:{tmp_path / "m"}', pretrained=True).eval()
    assert again.num_classes == kwargs['num_classes']
    x = images(model)
    assert torch.equal(again(x), model(x))
    data = timm.data.resolve_model_data_config(again)
    assert tuple(data['input_size']) == (model.in_chans, *model.patch_embed.img_size)
    assert len(data['mean']) == model.in_chans
    assert sum(data['mean']) / len(data['mean']) == pytest.approx(sum(model.pretrained_cfg['mean']) / 3)


def test_the_files_are_as_readable_as_any_other(tmp_path):
    before = os.umask(0o022)
    try:
        save_pretrained(create(num_classes=2, depth=1), tmp_path, auto_map=True)
    finally:
        os.umask(before)
    modes = {path.name: stat.filemode(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(('config.json', 'model.safetensors', 'hydra_vision_auto.py'), '-rw-r--r--')


def test_later_changes_are_saved(tmp_path):
    model = create(num_classes=5, pos_embed='learn')
    model.set_input_size(img_size=(64, 96), patch_size=8)
    model.reset_classifier(7, 'max')
    save_pretrained(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(1, 3, 64, 96)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize('kwargs', [*VARIANTS[:3], VARIANTS[-1]])
def test_transformers_round_trip(tmp_path, kwargs):
    """timm -> Hugging Face -> timm."""
    transformers = pytest.importorskip('transformers')
    model = create(**kwargs)
    x = images(model)
    expected = model(x)
    save_pretrained(model, tmp_path / 'a', label_names=[f'c{i}' for i in range(model.num_classes)])
    classifier = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'a').eval()
    assert torch.equal(classifier(x).logits, expected)
    assert classifier.config.id2label[1] == 'c1'
    features = transformers.AutoModel.from_pretrained(tmp_path / 'a').eval()(x)
    assert torch.equal(features.last_hidden_state, model.forward_features(x))
    assert torch.equal(features.pooler_output, model.forward_head(model.forward_features(x), pre_logits=True))

    classifier.save_pretrained(tmp_path / 'b')  # transformers' own writer
    back = timm.create_model(f'local-dir:{tmp_path / "b"}', pretrained=True).eval()
    assert torch.equal(back(x), expected)
    save_pretrained(classifier.timm_model, tmp_path / 'c')  # and ours again
    assert torch.equal(timm.create_model(f'local-dir:{tmp_path / "c"}', pretrained=True).eval()(x), expected)


def test_transformers_pipeline(tmp_path):
    transformers = pytest.importorskip('transformers')
    from PIL import Image

    save_pretrained(create(num_classes=3, img_size=64), tmp_path, label_names=['cat', 'dog', 'fish'])
    pipeline = transformers.pipeline('image-classification', model=str(tmp_path), device='cpu')
    answers = pipeline(Image.new('RGB', (80, 60), 'red'))
    assert {answer['label'] for answer in answers} == {'cat', 'dog', 'fish'}
    assert sum(answer['score'] for answer in answers) == pytest.approx(1.0, abs=1e-4)


def test_auto_map_opens_without_our_import(tmp_path):
    pytest.importorskip('transformers')
    model = create(num_classes=3, img_size=64)
    save_pretrained(model, tmp_path, auto_map=True)
    code = (
        'import sys, torch; from transformers import AutoModelForImageClassification as A, AutoModel;'
        'assert "hydra_vision" not in sys.modules;'
        f'm = A.from_pretrained({str(tmp_path)!r}, trust_remote_code=True).eval();'
        f'AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True);'
        'torch.manual_seed(3); torch.set_num_threads(1);'
        'print(m(torch.randn(1, 3, 64, 64)).logits.sum().item())'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(3)
    assert float(done.stdout) == model(torch.randn(1, 3, 64, 64)).sum().item()


def test_no_model_of_the_family_has_buffers_that_a_file_does_not_hold():
    """transformers 5 builds on the meta device: what is not in the file would stay garbage."""
    for kwargs in VARIANTS:
        model = timm.create_model('test_hydra_vit', device='meta', **kwargs)
        assert {name for name, _ in model.named_buffers()} <= set(model.state_dict())


def test_config_names_what_rebuilds_the_model(tmp_path):
    save_pretrained(create(num_classes=5, depth=2, patch_size=8), tmp_path, data_config=dict(mean=(0, 0, 0)))
    config = read_config(tmp_path)
    assert config['architecture'] == 'test_hydra_vit'
    assert config['num_classes'] == 5
    assert 'num_classes' not in config['model_args']
    assert (config['model_args']['depth'], config['model_args']['patch_size']) == (2, 8)
    assert config['pretrained_cfg']['mean'] == [0, 0, 0]


def test_nothing_is_overwritten(tmp_path):
    model = create(num_classes=5)
    save_pretrained(model, tmp_path)
    before = (tmp_path / 'model.safetensors').read_bytes()
    nn.init.zeros_(model.head.weight)
    with pytest.raises(FileExistsError, match='overwrite=True'):
        save_pretrained(model, tmp_path)
    assert (tmp_path / 'model.safetensors').read_bytes() == before
    save_pretrained(model, tmp_path, overwrite=True)
    assert (tmp_path / 'model.safetensors').read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ['config.json', 'model.safetensors']


def test_another_family(tmp_path):
    model = timm.create_model('test_vit', num_classes=5, img_size=96).eval()
    save_pretrained(model, tmp_path, model_args=dict(img_size=96))
    x = torch.randn(1, 3, 96, 96)
    assert torch.equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), model(x))


def test_wrapped_models(tmp_path):
    model = create(num_classes=5)
    save_pretrained(timm.utils.ModelEmaV3(model), tmp_path / 'a')
    save_pretrained(torch.compile(model), tmp_path / 'b')
    assert set(read_config(tmp_path / 'a')) == set(read_config(tmp_path / 'b'))


def test_bad_input(tmp_path):
    model = create(num_classes=5)
    (tmp_path / 'file').write_text('')
    lost = create(num_classes=5, depth=2)
    lost._model_args = {}
    for error, match, call in [
        (TypeError, 'Module', lambda: save_pretrained('m', tmp_path / 'x')),
        (ValueError, 'create_model', lambda: save_pretrained(hydra_vision.HydraViT(depth=1), tmp_path / 'x')),
        (ValueError, 'features_only', lambda: save_pretrained(create(features_only=True), tmp_path / 'x')),
        (ValueError, 'label_names has 2', lambda: save_pretrained(model, tmp_path / 'x', label_names=['a', 'b'])),
        (ValueError, 'data_config', lambda: save_pretrained(model, tmp_path / 'x', data_config=dict(size=3))),
        (ValueError, '3 values', lambda: save_pretrained(model, tmp_path / 'x', data_config=dict(std=(1.0, 1.0)))),
        (ValueError, 'another model', lambda: save_pretrained(lost, tmp_path / 'x')),
        (ValueError, 'do not build', lambda: save_pretrained(model, tmp_path / 'x', model_args=dict(depht=3))),
        (NotADirectoryError, 'is a file', lambda: save_pretrained(model, tmp_path / 'file')),
        (OSError, "folder='/proc/x' cannot be made", lambda: save_pretrained(model, '/proc/x')),
        (PermissionError, "folder='/proc' cannot be written", lambda: save_pretrained(model, '/proc')),
    ]:
        with pytest.raises(error, match=match):
            call()
    assert not (tmp_path / 'x').exists()


class _Hub:
    """Stands in for the Hub: remembers what was uploaded."""

    uploaded: ClassVar[dict] = {}

    def __init__(self, **kwargs) -> None:
        self.token = kwargs['token']

    def create_repo(self, repo_id, private, exist_ok):
        return type('Url', (), {'repo_id': repo_id})

    def file_exists(self, repo_id, filename):
        return False

    def upload_folder(self, repo_id, folder_path, commit_message):
        from pathlib import Path

        _Hub.uploaded = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}


def test_push_to_hub(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, 'HfApi', _Hub)
    monkeypatch.setattr(huggingface_hub, 'get_token', lambda: None)
    model = create(num_classes=5)
    with pytest.raises(PermissionError, match='token'):
        hydra_vision.push_to_hub(model, 'someone/model')
    with pytest.raises(ValueError, match='owner/name'):
        hydra_vision.push_to_hub(model, 'model', token='t')
    hydra_vision.push_to_hub(model, 'someone/model', token='t')
    assert set(_Hub.uploaded) == {'config.json', 'model.safetensors', 'README.md'}
    save_pretrained(model, tmp_path)
    assert _Hub.uploaded['model.safetensors'] == (tmp_path / 'model.safetensors').read_bytes()
    assert b'someone/model' in _Hub.uploaded['README.md']
