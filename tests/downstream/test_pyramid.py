"""The simple feature pyramid: strides, widths, what it rejects."""

import pytest
import timm
import torch

from hydra_vision import save_pretrained
from hydra_vision.downstream import SimpleFeaturePyramid, detector, register_pyramid
from hydra_vision.downstream.pyramid import isotropic_backbone, last_map


@pytest.mark.parametrize(('in_stride', 'strides'), [(16, (4, 8, 16, 32)), (8, (2, 4, 8, 16, 32)), (32, (4, 64))])
def test_strides(in_stride, strides):
    pyramid = SimpleFeaturePyramid(64, in_stride, strides=strides, out_channels=24, pool=True)
    side = 128
    x = torch.randn(2, 64, side // in_stride, 2 * side // in_stride)
    *maps, pooled = pyramid(x)
    assert [tuple(m.shape) for m in maps] == [(2, 24, side // s, 2 * side // s) for s in strides]
    assert torch.equal(pooled, maps[-1][..., ::2, ::2])
    for level, stride in zip(pyramid.levels, strides):  # ViTDet: a coarser level sees the maximum of the cells
        if stride > in_stride:
            pooled = torch.nn.functional.max_pool2d(x, stride // in_stride)
            convolutions = [module for module in level if not isinstance(module, torch.nn.MaxPool2d)]
            torch.testing.assert_close(level(x), torch.nn.Sequential(*convolutions)(pooled))


def test_every_level_reaches_the_backbone():
    model = isotropic_backbone('test_hydra_vit', depth=1)
    pyramid = SimpleFeaturePyramid(64)
    for level in range(4):
        model.zero_grad()
        pyramid(last_map(model, torch.randn(1, 3, 64, 96)))[level].square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_saved_weights_reach_the_backbones(tmp_path):
    """`pretrained=True` of all that builds on an isotropic backbone."""
    saved = timm.create_model('test_hydra_vit', depth=1, num_classes=2)
    save_pretrained(saved, tmp_path)
    name = f'local-dir:{tmp_path}'
    register_pyramid(name, name='saved_pyramid')
    bodies = [
        timm.create_model('saved_pyramid', features_only=True, pretrained=True).model,
        detector('fcos', name, num_classes=2, pretrained=True).backbone.body,
        timm.create_model('saved_pyramid', features_only=True).model,
    ]
    for body, same in zip(bodies, (True, True, False)):
        weight = body.blocks[0].mixer.in_proj.weight
        assert torch.equal(weight, saved.blocks[0].mixer.in_proj.weight) == same


def test_class_token_stays_out_of_the_map():
    model = isotropic_backbone('test_hydra_vit', depth=1, class_token=True)
    assert last_map(model, torch.randn(1, 3, 64, 96)).shape == (1, 64, 4, 6)


def test_bad_input():
    with pytest.raises(ValueError, match='power of two'):
        SimpleFeaturePyramid(64, 16, strides=(12,))
    with pytest.raises(ValueError, match='power of two'):
        SimpleFeaturePyramid(64, 14)
    with pytest.raises(ValueError, match='one entry per stride'):
        SimpleFeaturePyramid(64, 16, out_channels=(8, 8))
