"""segmentation-models-pytorch: DPT as it stands, the CNN-style decoders through the pyramid encoder."""

import pytest
import torch

import hydra_vision.downstream as downstream
from hydra_vision.downstream.pyramid import last_map

smp = pytest.importorskip('segmentation_models_pytorch')

DECODERS = [
    'Unet',
    'UnetPlusPlus',
    'FPN',
    'PAN',
    'PSPNet',
    'Linknet',
    'MAnet',
    'DeepLabV3',
    'DeepLabV3Plus',
    'UPerNet',
    'Segformer',
]


@pytest.fixture(scope='module')
def encoder() -> str:
    return downstream.register_smp_encoder('test_hydra_vit', depth=1)


def test_dpt_as_it_stands():
    model = smp.DPT('tu-test_hydra_vit', encoder_weights=None, decoder_readout='ignore', classes=3).eval()
    for size in ((160, 160), (64, 96)):
        assert model(torch.randn(1, 3, *size)).shape == (1, 3, *size)
    model = smp.DPT(
        'tu-test_hydra_vit',
        encoder_weights=None,
        decoder_readout='cat',
        classes=3,
        class_token=True,
        global_pool='token',
    ).eval()
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 3, 64, 96)


@pytest.mark.parametrize('decoder', DECODERS)
def test_decoders_train_a_step(encoder, decoder):
    model = getattr(smp, decoder)(encoder, encoder_weights=None, classes=3)
    size = (256, 256) if decoder == 'PAN' else (64, 96)  # PAN halves the coarsest map three times more
    loss = model(torch.randn(2, 3, *size)).square().mean()
    loss.backward()
    lost = [name for name, p in model.named_parameters() if p.grad is None]
    # levels that a decoder does not read (FPN starts at stride 4, DeepLabV3 reads the last one only)
    assert all(name.startswith('encoder.pyramid') for name in lost), lost
    model.eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, *size)).shape == (1, 3, *size)


@pytest.mark.parametrize(
    ('output_stride', 'sides'), [(32, [32, 16, 8, 4, 2]), (16, [32, 16, 8, 4, 4]), (8, [32, 16, 8, 8, 8])]
)
def test_strides_and_channels(encoder, output_stride, sides):
    module = smp.encoders.get_encoder(encoder, in_channels=1, depth=5, weights=None, output_stride=output_stride)
    assert len(module.model.blocks) == 1  # as it was registered, with other channels
    x = torch.randn(1, 1, 64, 64)
    maps = module(x)
    assert maps[0] is x
    for level, expected in zip(maps[1:], module.pyramid(last_map(module.model, x))):
        torch.testing.assert_close(level, expected)
    assert [m.shape[1] for m in maps] == module.out_channels
    assert [m.shape[-1] for m in maps] == [64, *sides]


def test_another_patch_size_and_a_vit():
    for name, kwargs in (('test_hydra_vit', dict(patch_size=8, depth=1)), ('test_vit', {})):
        encoder = downstream.register_smp_encoder(name, name=f'{name}-other', **kwargs)
        assert smp.Unet(encoder, encoder_weights=None)(torch.randn(2, 3, 64, 64)).shape == (2, 1, 64, 64)


def test_bad_input():
    for match, call in [
        ('nearest valid name', lambda: downstream.register_smp_encoder('test_hydra_vti')),
        ('isotropic', lambda: downstream.register_smp_encoder('resnet26d')),
        ('another encoder', lambda: downstream.register_smp_encoder('test_hydra_vit', name='resnet34')),
        ('another encoder', lambda: downstream.register_smp_encoder('test_hydra_vit', name='tu-x')),
        ('in_channels=', lambda: downstream.register_smp_encoder('test_hydra_vit', in_chans=4)),
        ('depht', lambda: downstream.register_smp_encoder('test_hydra_vit', depht=3)),
    ]:
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(AttributeError, match='detektor'):
        downstream.detektor  # noqa: B018
