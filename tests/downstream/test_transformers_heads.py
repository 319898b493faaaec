"""transformers' dense heads on `TimmBackbone`: our models as they stand, and through the registered pyramid."""

import pytest
import timm
import torch

from hydra_vision.downstream import register_pyramid

transformers = pytest.importorskip('transformers')
pytest.importorskip('scipy')


@pytest.fixture(scope='module')
def pyramid() -> str:
    return register_pyramid('test_hydra_vit', out_channels=32, depth=1)


def backbone(name: str, *out_indices: int) -> 'transformers.TimmBackboneConfig':
    return transformers.TimmBackboneConfig(backbone=name, out_indices=list(out_indices))


def learns(model: torch.nn.Module, loss: torch.Tensor) -> None:
    assert torch.isfinite(loss)
    loss.backward()
    weight = next(p for name, p in model.named_parameters() if name.endswith('patch_embed.proj.weight'))
    assert weight.grad.abs().max() > 0


@pytest.mark.parametrize(('name', 'size'), [('test_hydra_vit', (160, 160)), ('pyramid', (64, 96))])
def test_upernet(pyramid, name, size, tmp_path):
    config = transformers.UperNetConfig(
        backbone_config=backbone(pyramid if name == 'pyramid' else name, 0, 1, 2, 3),
        hidden_size=16,
        auxiliary_in_channels=32 if name == 'pyramid' else 64,
        auxiliary_channels=16,
        num_labels=3,
    )
    model = transformers.UperNetForSemanticSegmentation(config)
    out = model(torch.randn(2, 3, *size), labels=torch.randint(3, (2, *size)))
    assert out.logits.shape == (2, 3, *size)
    learns(model, out.loss)

    model.eval().save_pretrained(tmp_path)
    again = transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path).eval()
    x = torch.randn(1, 3, *size)
    weights = again.state_dict()
    assert all(torch.equal(t, weights[key]) for key, t in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(again(x).logits, model(x).logits)


def test_detr(pyramid):
    config = transformers.DetrConfig(
        backbone_config=backbone(pyramid, 3),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=5,
        num_labels=3,
    )
    model = transformers.DetrForObjectDetection(config)
    label = dict(class_labels=torch.tensor([1]), boxes=torch.tensor([[0.5, 0.5, 0.2, 0.2]]))
    out = model(torch.randn(1, 3, 64, 96), labels=[label])
    assert out.pred_boxes.shape == (1, 5, 4)
    learns(model, out.loss)


def test_mask2former(pyramid):
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone(pyramid, 0, 1, 2, 3),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=32,
        num_queries=5,
        num_labels=3,
        train_num_points=64,
    )
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    out = model(torch.randn(1, 3, 64, 96), mask_labels=[torch.ones(1, 64, 96)], class_labels=[torch.tensor([1])])
    assert out.masks_queries_logits.shape == (1, 5, 16, 24)  # stride 4
    learns(model, out.loss)


def test_the_registered_name(pyramid):
    model = timm.create_model(pyramid, features_only=True, out_indices=(0, -1), in_chans=1)
    assert [tuple(m.shape) for m in model(torch.randn(1, 1, 64, 96))] == [(1, 32, 16, 24), (1, 32, 2, 3)]
    assert model.feature_info.reduction() == [4, 32]
    model = timm.create_model(pyramid, features_only=True, out_indices=(3, 1))  # in the order that was asked for
    assert [64 // m.shape[2] for m in model(torch.randn(1, 3, 64, 96))] == model.feature_info.reduction() == [32, 8]
    assert register_pyramid('test_hydra_vit', out_channels=16, depth=1) == pyramid  # again, another width
    assert timm.create_model(pyramid, features_only=True).feature_info.channels() == [16] * 4
    register_pyramid('test_hydra_vit', out_channels=32, depth=1)


def test_bad_input(pyramid):
    for match, call in [
        ('features_only=True', lambda: timm.create_model(pyramid)),
        ('4 levels', lambda: timm.create_model(pyramid, features_only=True, out_indices=(4,))),
        ('already', lambda: register_pyramid('test_hydra_vit', name='resnet18')),
        ('identifier', lambda: register_pyramid('test_hydra_vit', name='a.b')),
        ('nearest valid name', lambda: register_pyramid('test_hydra_vti')),
        ('output_stride', lambda: timm.create_model(pyramid, features_only=True, output_stride=8)),
    ]:
        with pytest.raises(ValueError, match=match):
            call()
