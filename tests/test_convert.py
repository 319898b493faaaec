"""swap_mixers on timm's own models: what is replaced, what stays, what is rejected."""

import copy
import io

import pytest
import timm
import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2

from hydra_vision.convert import MixerAttention, swap_mixers
from hydra_vision.visualize.matrix import mixing_matrices

SMALL = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=5)
MODELS = {
    'test_vit': dict(img_size=64, num_classes=5),
    'test_vit4': dict(img_size=64, num_classes=5),
    'deit_tiny_distilled_patch16_224': SMALL,
    'deit3_small_patch16_224': SMALL,  # layer scale
    'vit_small_patch14_reg4_dinov2': SMALL,  # registers, layer scale
    'vit_little_patch16_reg4_gap_256': SMALL,  # qk norm
    'vit_base_patch16_siglip_224': {**SMALL, 'class_token': False},  # attention pooling
    'eva02_tiny_patch14_224': SMALL,
    'vit_small_patch16_dinov3': SMALL,
    'beit_base_patch16_224': SMALL,
    'vit_srelpos_small_patch16_224': SMALL,  # one relative position bias for all blocks
    'test_vit_relpos': dict(img_size=64, num_classes=5) if 'test_vit_relpos' in timm.list_models() else SMALL,
}
POSITION = ('eva02', 'vit_small_patch16_dinov3', 'beit', 'test_vit_relpos', 'vit_srelpos')


def build(name, **kwargs):
    torch.manual_seed(0)
    try:
        return timm.create_model(name, **{**MODELS[name], **kwargs})
    except (RuntimeError, TypeError) as error:
        pytest.skip(f'{name}: {error}')


def images(model, batch=2):
    height, width = model.patch_embed.img_size
    return torch.randn(batch, 3, height, width)


def swap(model, name, **kwargs):
    return swap_mixers(model, drop_position=name.startswith(POSITION), **kwargs)


@pytest.mark.parametrize('name', MODELS)
def test_every_kind_of_vit(name):
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    count = sum(p.numel() for p in model.parameters())
    attentions = [n for n, m in model.named_modules() if n.endswith('.attn')]
    swapped = swap(model, name, headdim=32)
    assert swapped is model
    report = model.swap_report
    assert list(report.replaced) == attentions
    assert report.parameters_before == count
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert report.parameters_after - count == report.mixer_parameters - report.attention_parameters
    assert f'{count:,}' in str(report)
    for key, value in model.state_dict().items():  # everything else is as it was
        if '.attn.' not in key:
            assert torch.equal(value, before[key]), key

    x = images(model)
    model.train()
    model(x).square().sum().backward()
    for attention in attentions:
        for key, parameter in model.get_submodule(attention).named_parameters():
            assert parameter.grad is not None, key
    model.eval()
    with torch.no_grad():
        out = model(x)
        assert out.shape == (2, 5)
        other = swap(build(name), name, headdim=32).eval()
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer))
        assert torch.equal(other(x), out)


def test_the_mixer_takes_the_place_of_the_attention():
    """The model equals its own blocks with the mixer called by hand."""
    model = swap_mixers(build('deit3_small_patch16_224')).eval()
    for block in model.blocks:
        nn.init.normal_(block.ls1.gamma)
    x = images(model)
    with torch.no_grad():
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        for block in model.blocks:
            tokens = tokens + block.ls1(block.attn.mixer(block.norm1(tokens)))
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        torch.testing.assert_close(model.forward_features(x), model.norm(tokens))


@pytest.mark.parametrize('mixer', ['hydra', 'toeplitz', 'attention', 'semiseparable', 'low_rank'])
def test_any_mixer(mixer):
    model = swap_mixers(build('test_vit'), mixer, headdim=32)
    assert model(images(model)).shape == (2, 5)
    assert model.swap_report.mixer == mixer


def test_new_weights_are_those_of_a_new_hydra_vit():
    model = swap_mixers(build('test_vit', embed_dim=192, num_heads=3))
    for name, module in model.blocks.named_modules():
        if '.mixer.' in name and isinstance(module, nn.Linear):
            assert module.weight.detach().std().item() == pytest.approx(0.02, rel=0.1), name


def test_fixed_matrices_know_the_grid_and_the_class_token():
    model = swap_mixers(build('vit_small_patch14_reg4_dinov2'), 'dense', headdim=32)
    tokens = model.blocks[0].attn.mixer.tokens
    assert (tokens.size, tokens.num_prefix_tokens) == ((4, 4), 5)
    assert model(images(model)).shape == (2, 5)
    with pytest.raises(ValueError, match='grid_size'):
        swap_mixers(build('test_vit'), 'dense', headdim=32, grid_size=(2, 2))


def test_some_blocks():
    model = swap_mixers(build('deit3_small_patch16_224'), blocks=[-1])
    assert [type(block.attn).__name__ for block in model.blocks] == ['Attention', 'MixerAttention']
    assert model.swap_report.replaced == ('blocks.1.attn',)
    assert model.swap_report.kept == ('blocks.0.attn',)
    assert 'attention that was kept: blocks.0.attn' in str(model.swap_report)
    first = swap_mixers(build('deit3_small_patch16_224', depth=3), blocks=[-2])
    assert first.swap_report.replaced == ('blocks.1.attn',)
    again = swap_mixers(model)  # the rest
    assert again.swap_report.replaced == ('blocks.0.attn',)


def test_a_pattern_of_mixers():
    model = build('vit_small_patch14_reg4_dinov2', depth=4)
    swap_mixers(model, ('hydra', 'checkpoint'), headdim=32)
    hydra, checkpoint = (model.blocks[i].attn.mixer for i in (2, 3))
    assert (type(hydra).__name__, type(checkpoint).__name__) == ('Hydra', 'CheckpointAttention')
    assert checkpoint.tokens.num_prefix_tokens == 5  # class and register tokens
    assert model.swap_report.mixer == 'hydra, checkpoint'
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    with pytest.raises(ValueError, match='a pattern of 2 does not divide depth=3'):
        swap_mixers(build('vit_small_patch14_reg4_dinov2', depth=4), ('hydra', 'checkpoint'), blocks=[0, 1, 2])


def test_weight_decay_leaves_out_what_the_mixers_ask_for():
    model = swap_mixers(build('test_vit'), 'dense', headdim=32)
    names = model.no_weight_decay()
    own = set(model.blocks[0].attn.mixer.no_weight_decay())
    assert own
    assert {'pos_embed', *(f'blocks.0.attn.mixer.{leaf}' for leaf in own)} <= names
    optimizer = create_optimizer_v2(model, opt='adamw', weight_decay=0.1)
    decayed = {id(p) for group in optimizer.param_groups if group['weight_decay'] > 0 for p in group['params']}
    parameters = dict(model.named_parameters())
    assert not any(id(parameters[name]) in decayed for name in names if name in parameters)
    assert id(parameters['blocks.0.attn.mixer.in_proj.weight']) in decayed
    assert copy.deepcopy(model).no_weight_decay() == names


def test_mode_dtype_and_dropout_are_kept():
    model = build('test_vit', proj_drop_rate=0.25).to(torch.float64).eval()
    swap_mixers(model, headdim=32)
    attention = model.blocks[0].attn
    assert isinstance(attention, MixerAttention)
    assert attention.proj_drop.p == 0.25
    assert not attention.training
    assert attention.mixer.in_proj.weight.dtype == torch.float64


def test_dropped_patches_stay_in_order():
    model = swap_mixers(build('test_vit', patch_drop_rate=0.5), headdim=32).train()
    assert model.patch_drop.ordered
    assert model(images(model)).shape == (2, 5)


def test_tracing_and_intermediates():
    model = swap_mixers(build('test_vit'), headdim=32).eval()
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))
        (features,) = model.forward_intermediates(x, indices=1, intermediates_only=True)
    assert features.shape[2:] == tuple(model.patch_embed.grid_size)


def test_matrices_can_be_shown():
    model = swap_mixers(build('test_vit'), headdim=32).eval()
    blocks = mixing_matrices(model, images(model, 1))
    assert [block.name for block in blocks] == [f'blocks.{i}.attn' for i in range(len(model.blocks))]
    assert blocks[0].num_prefix_tokens == model.num_prefix_tokens


@pytest.mark.parametrize('name', ['resnet18', 'swin_tiny_patch4_window7_224', 'hydra_vit_nano'])
def test_models_without_such_attention(name):
    with pytest.raises(ValueError, match='no attention that can be swapped'):
        swap_mixers(timm.create_model(name, device='meta'))


def test_positions_are_not_lost_in_silence():
    for name in ('eva02_tiny_patch14_224', 'beit_base_patch16_224'):
        model = build(name)
        with pytest.raises(ValueError, match='drop_position=True'):
            swap_mixers(model)
        assert not any(isinstance(m, MixerAttention) for m in model.modules())  # nothing was changed
        assert swap_mixers(model, drop_position=True).swap_report.dropped_position
    with pytest.raises(ValueError, match='encodes no positions'):
        swap_mixers(build('test_vit'), drop_position=True)


def test_bad_arguments():
    model = build('test_vit')
    with pytest.raises(ValueError, match='hydar'):
        swap_mixers(model, 'hydar')
    with pytest.raises(TypeError, match='d_sate'):
        swap_mixers(model, d_sate=16)
    with pytest.raises(ValueError, match='headdim=7 '):
        swap_mixers(model, headdim=7)
    with pytest.raises(ValueError, match='blocks'):
        swap_mixers(model, blocks=[99])
    with pytest.raises(ValueError, match='blocks is empty'):
        swap_mixers(model, blocks=[])
    assert not any(isinstance(m, MixerAttention) for m in model.modules())
    attention = swap_mixers(model, headdim=32).blocks[0].attn
    x = torch.randn(1, 5, model.embed_dim)
    with pytest.raises(ValueError, match='attn_mask'):
        attention(x, attn_mask=torch.zeros(5, 5))
    with pytest.raises(ValueError, match='drop_position'):
        attention(x, rope=torch.zeros(5, 64))
