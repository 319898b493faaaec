"""Files of weights and odd files given for them."""

import argparse

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from hydra_vision.errors import CheckpointError, UserError
from hydra_vision.weights import brief_mismatch, read_weights, write_tensors


class _Wrapper(nn.Module):
    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        self.add_module(name, model)


def same(weights: dict, model: nn.Module) -> bool:
    expected = model.state_dict()
    return weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in expected)


def test_weights_come_out_under_the_names_of_the_bare_model(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    state = model.state_dict()
    path = tmp_path / 'w.pth'
    for held in (
        state,
        {'state_dict': state, 'epoch': 3, 'args': argparse.Namespace(lr=1)},
        {'state_dict': {'0.weight': torch.zeros(1)}, 'state_dict_ema': state},
        {'model': state, 'optimizer': {}},
        _Wrapper('module', torch.compile(model)).state_dict(),
        {'state_dict': _Wrapper('model', _Wrapper('timm_model', model)).state_dict()},
    ):
        torch.save(held, path)
        assert same(read_weights(path), model)
    write_tensors(state, tmp_path / 'w.safetensors')
    assert same(read_weights(tmp_path / 'w.safetensors'), model)


def odd_files(folder):
    """Files that are no weights, and what is said of them."""
    good = folder / 'good.pth'
    torch.save({'a': torch.zeros(1000)}, good)
    save_file({'a': torch.zeros(1000)}, folder / 'good.safetensors')
    old = folder / 'old.pth'
    torch.save({'a': torch.zeros(1000)}, old, _use_new_zipfile_serialization=False)
    for name, content, text in (
        ('zero.pth', b'', 'is empty'),
        ('zero.safetensors', b'', 'is empty'),
        ('cut.pth', good.read_bytes()[:2000], 'cut off or damaged'),
        ('old_cut.pth', old.read_bytes()[:2000], 'damaged'),
        ('cut.safetensors', (folder / 'good.safetensors').read_bytes()[:2000], 'cut off or damaged'),
        ('table.csv', b'a,b\n1,2\n', 'is a text file'),
        ('page.pth', b'<!DOCTYPE html><html>', 'is an HTML page'),
        ('pointer.safetensors', b'version https://git-lfs.github.com/spec/v1\n', 'a Git LFS pointer'),
        ('image.pth', b'\x89PNG\r\n\x1a\n' + b'0' * 100, 'is an image'),
        ('noise.bin', bytes(range(128, 256)), 'damaged, or another kind of file'),
    ):
        (folder / name).write_bytes(content)
        yield folder / name, text
    for name, held, text in (
        ('list.pth', [1, 2], 'holds a list'),
        ('empty.pth', {}, 'holds no tensors'),
        ('inner.pth', {'state_dict': {}}, 'holds no tensors'),
        ('model.pth', nn.Linear(2, 2), r'holds a Python object \(torch\.nn\.modules\.linear\.Linear\).*run code'),
    ):
        torch.save(held, folder / name)
        yield folder / name, text


def test_odd_files_are_one_line(tmp_path):
    for path, text in odd_files(tmp_path):
        with pytest.raises(CheckpointError, match=text) as error:
            read_weights(path)
        message = str(error.value)
        assert str(path) in message
        assert 'expected weights' in message
        assert '\n' not in message
        assert '\x1b' not in message
        assert 'weights_only' not in message
    with pytest.raises(UserError, match='is not a file'):
        read_weights(tmp_path)


def test_a_mismatch_is_one_line():
    model = timm.create_model('test_vit', num_classes=3)
    state = timm.create_model('test_vit2', num_classes=4).state_dict()
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict({**state, 'more': torch.zeros(1)})
    (line,) = brief_mismatch(error.value).splitlines()
    assert 'unexpected (such as ' in line
    assert 'of another shape' in line
    assert len(line) < 400
