"""Hydra-ViT against timm's contract: what timm's own test-suite asks of a model, on our family."""

import copy
import fnmatch

import pytest
import timm
import torch
import torch.nn as nn
from safetensors.torch import save_file
from timm.layers import set_scriptable
from timm.models import FeatureInfo, load_checkpoint
from timm.models._input import get_model_input_config
from timm.models._manipulate import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

import hydra_vision
from hydra_vision.models.hydra_vit import checkpoint_filter_fn

NAMES = ('test_hydra_vit', 'hydra_vit_nano', 'hydra_vit_tiny', 'hydra_vit_small', 'hydra_vit_base', 'hydra_vit_large')
SMALL = dict(img_size=64, num_classes=5)
VARIANTS = [
    dict(),
    dict(mlp_ratio=4.0),
    dict(pos_embed='learn', class_token=True, global_pool='token'),
    dict(class_token=True, class_token_position='middle', pos_embed='learn'),
    dict(class_token=True, class_token_position='last', global_pool='max'),
    dict(learnable_init_states=True, share_bc=True, d_state=16, ngroups=2, headdim=16, expand=1, d_conv=3),
]


def create(**kwargs) -> hydra_vision.HydraViT:
    torch.manual_seed(0)
    return timm.create_model('test_hydra_vit', **{**SMALL, **kwargs}).eval()


def images(B: int = 2, H: int = 64, W: int = 64, C: int = 3) -> torch.Tensor:
    return torch.randn(B, C, H, W, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ('name', 'millions'),
    [
        ('hydra_vit_nano', 1.88),
        ('hydra_vit_tiny', 7.08),
        ('hydra_vit_small', 24.95),
        ('hydra_vit_base', 93.20),
        ('hydra_vit_large', 323.8),
    ],
)
def test_parameter_counts(name, millions):
    model = timm.create_model(name, device='meta')
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)


def test_parameter_counts_around_the_paper():
    """The paper says 91 M; the docstring's account of what gives that."""

    def millions(**kwargs):
        return sum(p.numel() for p in timm.create_model('hydra_vit_base', device='meta', **kwargs).parameters()) / 1e6

    assert millions(depth=23) == pytest.approx(89.38, rel=1e-3)
    assert millions(share_bc=True) == pytest.approx(90.8, rel=1e-3)
    assert millions(d_state=32) == pytest.approx(90.8, rel=1e-3)


@pytest.mark.parametrize('name', NAMES)
def test_registered_with_a_configuration(name):
    assert name in timm.list_models('*hydra_vit*')
    assert timm.list_models(module='hydra_vit')
    cfg = timm.get_pretrained_cfg(f'{name}.untrained')
    assert cfg.input_size == ((3, 160, 160) if name == 'test_hydra_vit' else (3, 224, 224))
    assert (cfg.first_conv, cfg.classifier, cfg.pool_size) == ('patch_embed.proj', 'head', None)
    assert (cfg.crop_pct, cfg.interpolation, cfg.fixed_input_size) == (0.9, 'bicubic', False)
    assert cfg.license == 'mit'
    with pytest.raises(RuntimeError, match=r'[Nn]o pretrained weights|Invalid pretrained|untrained'):
        timm.create_model(name, pretrained=True, device='meta')


@pytest.mark.parametrize('kwargs', VARIANTS)
def test_training_step_reaches_every_parameter_with_and_without_checkpointing(kwargs):
    gradients = []
    for enable in (False, True):
        model = create(**kwargs).train()
        model.set_grad_checkpointing(enable)
        out = model(images())
        assert out.shape == (2, 5)
        out.square().mean().backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
        gradients.append([out.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)
    assert not list(model.buffers()), 'buffers would not survive loading through the meta device'


def test_unknown_and_wrong_arguments():
    with pytest.raises(TypeError):
        create(not_a_model_arg=1)
    for kwargs, message in (
        (dict(global_pool='mean'), "global_pool='mean'; allowed:"),
        (dict(global_pool='token'), 'needs class_token=True'),
        (dict(pos_embed='rope'), "pos_embed='rope'; allowed: 'none', 'learn'"),
        (dict(class_token=True, class_token_position='front'), "class_token_position='front'"),
        (dict(img_size=8), 'img_size=8 is smaller than patch_size=16'),
        (dict(depth=0), 'depth=0'),
        (dict(mlp_ratio=-1.0), 'mlp_ratio=-1.0'),
        (dict(mlp_ratio=0.01), 'mlp_ratio=0.01'),
        (dict(class_token_position='last'), "class_token_position='last' needs class_token=True"),
        (dict(drop_path_rate=1.5), 'drop_path_rate=1.5; allowed: 0 <= drop_path_rate < 1'),
        (dict(proj_drop_rate=-0.1), 'proj_drop_rate=-0.1'),
        (dict(patch_drop_rate=1.0), 'patch_drop_rate=1.0'),
        (dict(patch_size=0), r'patch_size=\(0, 0\); it must be a number or'),
        (dict(img_size=(64,)), r'img_size=\(64,\); it must be'),
        (dict(d_conv=4), 'd_conv=4; it must be odd'),
        (dict(backend='cuda'), "unknown backend 'cuda'"),
        (dict(img_size=60, dynamic_img_pad=True, pos_embed='learn'), 'needs dynamic_img_size=True'),
    ):
        with pytest.raises(ValueError, match=message):
            create(**kwargs)


def test_class_token_positions_scan_differently_but_return_the_token_first():
    outputs = {}
    for position in ('first', 'middle', 'last'):
        model = create(class_token=True, class_token_position=position, global_pool='token')
        with torch.no_grad():
            model.cls_token.copy_(torch.linspace(-1, 1, 64))
            features = model.forward_features(images())
            final, taps = model.forward_intermediates(images(), norm=True, return_prefix_tokens=True, output_fmt='NLC')
        assert features.shape == (2, 17, 64)
        torch.testing.assert_close(final, features)
        patches, prefix = taps[-1]
        torch.testing.assert_close(torch.cat([prefix, patches], 1), features)
        outputs[position] = features[:, 0]
    assert not torch.allclose(outputs['first'], outputs['last'])
    assert not torch.allclose(outputs['first'], outputs['middle'])


def test_middle_class_token_sits_between_the_patches():
    model = create(class_token=True, class_token_position='middle')
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model.cls_token.fill_(7.0)
        model(images())
    assert (seen[0][:, 8] == 7).all()
    assert not (seen[0] == 7).all(-1)[:, [*range(8), *range(9, 17)]].any()


@pytest.mark.parametrize('kwargs', VARIANTS)
def test_intermediates(kwargs):
    model = create(**kwargs)
    x = images()
    with torch.no_grad():
        final, taps = model.forward_intermediates(x)
        torch.testing.assert_close(final, model.forward_features(x))
        torch.testing.assert_close(model.forward_head(final), model(x))
        info = FeatureInfo(model.feature_info, len(model.feature_info))
        assert [t.shape for t in taps] == [(2, c, 64 // r, 64 // r) for c, r in zip(info.channels(), info.reduction())]
        lists = model.forward_intermediates(x, indices=2, output_fmt='NLC', intermediates_only=True)
        assert [t.shape for t in lists] == [(2, 16, 64)] * 2
        torch.testing.assert_close(lists[1].mT.unflatten(2, (4, 4)), taps[-1])
        early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(early[0], taps[1])
        out = model.forward_intermediates(x, indices=[-1], output_dict=True, norm=True, return_prefix_tokens=True)
        assert ('image_intermediates_prefix' in out) == bool(model.num_prefix_tokens)
        torch.testing.assert_close(out['image_features'], final)
        layers = model.get_intermediate_layers(x, n=2, reshape=True, norm=True)
        assert [t.shape for t in layers] == [(2, 64, 4, 4)] * 2
    with pytest.raises(AssertionError):
        model.forward_intermediates(x, output_fmt='NHWC')


def test_stop_early_runs_no_further_block():
    model = create()
    model.blocks[2].register_forward_pre_hook(lambda *args: pytest.fail('block 2 ran'))
    model.forward_intermediates(images(), indices=[1], stop_early=True, intermediates_only=True)


def test_features_only():
    model = timm.create_model('test_hydra_vit', img_size=64, features_only=True, out_indices=(0, 1, 3)).eval()
    assert model.feature_info.channels() == [64] * 3
    assert model.feature_info.reduction() == [16] * 3
    assert [f.shape for f in model(images())] == [(2, 64, 4, 4)] * 3


@pytest.mark.parametrize('index', [0, 1, 3])
def test_prune_intermediate_layers(index):
    model = create()
    x = images()
    with torch.no_grad():
        taps = model.forward_intermediates(x, intermediates_only=True)
        expected = model(x)
        whole = copy.deepcopy(model)
        whole.prune_intermediate_layers([3], prune_head=False)
        torch.testing.assert_close(whole(x), expected)
    take = model.prune_intermediate_layers([index], prune_norm=True)
    assert len(model.blocks) == index + 1
    assert model.num_classes == 0
    selected = model.forward_intermediates(x, indices=take, intermediates_only=True)
    torch.testing.assert_close(selected[0], taps[index])
    features = model.train().forward_features(x)
    (selected[0].sum() + features.sum()).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    model.reset_classifier(7, 'avg')
    assert model(x).shape == (2, 7)


def test_reset_classifier():
    model = create(global_pool='max')
    x = images()
    model.reset_classifier(0)
    assert (model.num_classes, model.global_pool) == (0, 'max')
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, '')
    assert model(x).shape == (2, 16, 64)
    model.train()
    model.reset_classifier(9, 'avg')
    assert model.head.training
    assert model(x).shape == (2, 9)
    with pytest.raises(AssertionError, match='catavgmax'):
        model.reset_classifier(9, 'catavgmax')
    with pytest.raises(AssertionError, match='class token'):
        model.reset_classifier(9, 'token')
    model.to(dtype=torch.float64, device='meta')
    model.reset_classifier(2)
    assert (model.head.weight.dtype, model.head.weight.device.type) == (torch.float64, 'meta')
    assert timm.create_model('test_hydra_vit', num_classes=0, global_pool='', img_size=64)(x).shape == (2, 16, 64)


@pytest.mark.parametrize('kwargs', VARIANTS)
def test_init_weights_after_to_empty_restores_everything(kwargs):
    model = create(**kwargs, device='meta', dtype=torch.float64)
    assert {p.device.type for p in model.parameters()} == {'meta'}
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model = model.to_empty(device='cpu')
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float('nan'))
    model.init_weights()
    assert not [n for n, p in model.named_parameters() if not torch.isfinite(p).all()]
    mixer = model.blocks[0].mixer
    assert torch.equal(mixer.A_log, torch.zeros_like(mixer.A_log))
    assert torch.equal(mixer.D, torch.ones_like(mixer.D))
    assert torch.equal(mixer.norm.weight, torch.ones_like(mixer.norm.weight))
    assert mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert mixer.fc_D.weight.std().item() == pytest.approx(0.02, rel=0.35)
    assert torch.isfinite(model(images().double())).all()


def test_initialisation_is_the_recipes():
    model = create(mlp_ratio=2.0)
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear):
            assert 0.012 < m.weight.std().item() < 0.028, name
            assert m.bias is None or not m.bias.any(), name


def test_no_weight_decay_reaches_the_parameters():
    model = create(class_token=True, pos_embed='learn', learnable_init_states=True)
    names = [n for n, _ in model.named_parameters()]
    patterns = model.no_weight_decay()
    assert all(any(fnmatch.fnmatch(n, p) for n in names) for p in patterns)
    undecayed = {n for n in names if any(fnmatch.fnmatch(n, p) for p in patterns)}
    ends = ('A_log', '.D', 'dt_bias', 'init_states', 'pos_embed', 'cls_token')
    assert undecayed == {n for n in names if n.endswith(ends)}

    by_id = {id(p): n for n, p in model.named_parameters()}
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=patterns)
    decayed = {by_id[id(p)] for g in groups if g['weight_decay'] for p in g['params']}
    expected = {'in_proj.weight', 'out_proj.weight', 'fc_D.weight', 'conv1d.weight', 'head.weight', 'proj.weight'}
    assert {n for n in decayed if not any(n.endswith(e) for e in expected)} == set()
    assert len(decayed) == 4 * 4 + 2


def test_layer_groups():
    model = create(class_token=True, pos_embed='learn')
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers['cls_token'] == layers['pos_embed'] == layers['patch_embed.proj.weight'] == 0
    assert [layers[f'blocks.{i}.mixer.A_log'] for i in range(4)] == [1, 2, 3, 4]
    assert layers['norm.weight'] == 4  # with the last block
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    assert len({g['lr_scale'] for g in groups}) == 6  # stem, four blocks, head
    assert len(set(group_parameters(model, model.group_matcher(coarse=True), reverse=True).values())) > 1


@pytest.mark.parametrize('kwargs', VARIANTS[:4])
def test_set_input_size(kwargs):
    model = create(**kwargs).requires_grad_(False)
    model.set_input_size(img_size=(96, 128))
    assert model(images(H=96, W=128)).shape == (2, 5)
    assert not [n for n, p in model.named_parameters() if p.requires_grad]
    assert model.patch_embed.grid_size == (6, 8)
    model.set_input_size(patch_size=(8, 8))
    assert model.feature_info[0]['reduction'] == 8
    assert model(images(H=96, W=128)).shape == (2, 5)
    if model.pos_embed is None:
        assert model(images()).shape == (2, 5)
    else:
        with pytest.raises(AssertionError, match=r"doesn't match model .96.; dynamic_img_size=True"):
            model(images())


@pytest.mark.parametrize(
    ('kwargs', 'size', 'message'),
    [
        (dict(), dict(img_size=8), 'img_size=8 is smaller than patch_size'),
        (dict(pos_embed='learn'), dict(patch_size=(0, 8)), 'patch_size=.0, 8.; it must be'),
        (dict(pos_embed='learn', dynamic_img_pad=True), dict(img_size=60), 'needs dynamic_img_size=True'),
        (dict(mixer='toeplitz', mixer_kwargs=dict(data_dependent=False), class_token=True), dict(img_size=96), 'class'),
        (dict(mixer='vandermonde', mixer_kwargs=dict(data_dependent=False)), dict(patch_size=8), 'cannot be resampled'),
        (dict(mixer='dense', scan_order='column'), dict(img_size=96), "scan_order='column'"),
    ],
)
def test_a_rejected_input_size_leaves_the_model_as_it_was(kwargs, size, message):
    model = create(**kwargs)
    expected = model(images())
    with pytest.raises(ValueError, match=message):
        model.set_input_size(**size)
    assert torch.equal(model(images()), expected)
    model.set_input_size(img_size=64)  # its own size
    assert torch.equal(model(images()), expected)


def test_a_model_without_positions_takes_any_size_as_it_stands():
    model = create(mixer=('hydra', 'vit_attention'))
    assert model.patch_embed(images()).shape == (2, 16, 64)
    assert not get_model_input_config(model)['fixed_input_size']
    for size in ((32, 96), (16, 16)):
        x = images(2, *size)
        assert torch.equal(model(x), create(mixer=('hydra', 'vit_attention'), img_size=size)(x))
    assert create(dynamic_img_pad=True)(images(H=50, W=70)).shape == (2, 5)
    with pytest.raises(AssertionError, match=r'height .60. should be divisible by 16; dynamic_img_pad=True'):
        model(images(H=60))
    for kwargs in (dict(pos_embed='learn'), dict(mixer='dense')):
        fixed = create(**kwargs)
        assert get_model_input_config(fixed)['fixed_input_size']
        with pytest.raises(AssertionError, match=r"width .96. doesn't match model .64.; dynamic_img_size=True"):
            fixed(images(W=96))


@pytest.mark.parametrize('kwargs', VARIANTS[:4])
@pytest.mark.parametrize('size', [(64, 64), (32, 96), (16, 16), (112, 48)])
def test_dynamic_img_size_takes_rectangles(size, kwargs):
    fixed, dynamic = create(**kwargs), create(**kwargs, dynamic_img_size=True)
    dynamic.load_state_dict(fixed.state_dict())
    x = images(H=size[0], W=size[1])
    assert dynamic(x).shape == (2, 5)
    maps = dynamic.forward_intermediates(x, indices=1, intermediates_only=True)
    assert maps[0].shape == (2, 64, size[0] // 16, size[1] // 16)
    if size == (64, 64):
        torch.testing.assert_close(dynamic(x), fixed(x))
    with pytest.raises(AssertionError, match='divisible'):
        dynamic(images(H=60))


def test_dynamic_img_pad():
    model = create(dynamic_img_size=True, dynamic_img_pad=True)
    x = images(H=50, W=70)
    assert model.forward_intermediates(x, indices=1, intermediates_only=True)[0].shape == (2, 64, 4, 5)
    padded = nn.functional.pad(x, (0, 10, 0, 14))
    torch.testing.assert_close(model(x), model(padded))


@pytest.mark.parametrize('in_chans', [1, 4, 12])
@pytest.mark.parametrize('kwargs', [dict(), dict(pos_embed='learn')])
def test_checkpoint_at_another_size_and_channel_count(tmp_path, in_chans, kwargs):
    """Weights at 64 px, RGB, 5 classes -> 96 x 128 px, other channels, 7 classes."""
    source = create(**kwargs)
    save_file(source.state_dict(), tmp_path / 'model.safetensors')
    overlay = dict(file=str(tmp_path / 'model.safetensors'), num_classes=5, input_size=(3, 64, 64))
    model = timm.create_model(
        'test_hydra_vit',
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        img_size=(96, 128),
        in_chans=in_chans,
        num_classes=7,
        **kwargs,
    ).eval()
    assert model(images(H=96, W=128, C=in_chans)).shape == (2, 7)
    assert torch.equal(model.blocks[3].mixer.in_proj.weight, source.blocks[3].mixer.in_proj.weight)
    assert model.patch_embed.proj.weight.shape[1] == in_chans
    if in_chans == 1:
        torch.testing.assert_close(model.patch_embed.proj.weight, source.patch_embed.proj.weight.sum(1, keepdim=True))


def test_patch_size_of_a_checkpoint_is_resampled():
    source, model = create(patch_size=16), create(patch_size=8)
    model.load_state_dict(checkpoint_filter_fn(source.state_dict(), model), strict=True)
    assert model(images()).shape == (2, 5)


@pytest.mark.parametrize(
    'wrap',
    [
        lambda sd: sd,
        lambda sd: {'state_dict': sd},
        lambda sd: {'model': {f'module.{k}': v for k, v in sd.items()}, 'epoch': 3},
        lambda sd: {
            'backbone.' + k.replace('blocks.', 'layers.').replace('.norm1.', '.norm.')
            if k.startswith('blocks.')
            else k.replace('norm.', 'norm_f.'): v
            for k, v in sd.items()
        },
    ],
    ids=['plain', 'state_dict', 'module', 'stack of released mixers'],
)
def test_checkpoint_names(wrap):
    source = create()
    target = timm.create_model('test_hydra_vit', img_size=64, num_classes=5)
    target.load_state_dict(checkpoint_filter_fn(wrap(source.state_dict()), target), strict=True)
    for a, b in zip(source.parameters(), target.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_mismatched_checkpoint_is_an_error(tmp_path, suffix):
    path = tmp_path / f'weights{suffix}'
    state = create().state_dict()
    broken = {k: v for k, v in state.items() if 'blocks.2.' not in k}
    (save_file if suffix == '.safetensors' else torch.save)(broken, path)
    with pytest.raises(RuntimeError, match=r'Missing key.*blocks\.2\.'):
        timm.create_model('test_hydra_vit', img_size=64, num_classes=5, checkpoint_path=str(path))
    with pytest.raises(RuntimeError, match='size mismatch'):
        load_checkpoint(create(embed_dim=128), _saved(state, tmp_path / f'other{suffix}'))


def _saved(state, path):
    (save_file if path.suffix == '.safetensors' else torch.save)(state, path)
    return str(path)


def test_position_embedding_of_an_unknown_rectangle_is_timms_error(tmp_path):
    state = create(pos_embed='learn', img_size=(32, 96)).state_dict()  # 2 x 6: nothing in the file says so
    path = _saved(state, tmp_path / 'weights.safetensors')
    with pytest.raises(RuntimeError, match='size mismatch for pos_embed'):
        timm.create_model('test_hydra_vit', img_size=64, num_classes=5, pos_embed='learn', checkpoint_path=path)
    with pytest.raises(RuntimeError, match='size mismatch for pos_embed'):
        load_checkpoint(create(pos_embed='learn'), path, filter_fn=checkpoint_filter_fn)


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_checkpoint_path_round_trip(tmp_path, suffix):
    model = create(class_token=True)
    path = _saved(model.state_dict(), tmp_path / f'weights{suffix}')
    again = timm.create_model(
        'test_hydra_vit', img_size=64, num_classes=5, class_token=True, checkpoint_path=path
    ).eval()
    assert torch.equal(again(images()), model(images()))


@pytest.mark.parametrize('kwargs', [*VARIANTS[:3], dict(dynamic_img_size=True)], ids=str)
def test_tokens_lie_in_rows_through_all_blocks(kwargs):
    """A transposed residual stream would cost every block strided sums and copies."""
    model = create(**kwargs)
    layouts = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: layouts.extend([inputs[0], output]))
    with torch.no_grad():
        model(images())
    assert len(layouts) == 2 * len(model.blocks)
    assert all(t.is_contiguous() for t in layouts)


def test_bfloat16_model():
    model = create().to(torch.bfloat16)
    assert model(images().bfloat16()).dtype == torch.bfloat16


def test_patch_dropout_keeps_order():
    model = create(patch_drop_rate=0.5, pos_embed='learn').train()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()
        model.pos_embed.copy_(torch.arange(16.0).view(1, 16, 1).expand(1, 16, 64))
        model(images())
    order = seen[0][..., 0] - model.patch_embed.proj.bias[0]
    assert order.shape == (2, 8)
    assert (order.diff(dim=1) > 0.5).all()
    with pytest.raises(AssertionError, match='feature map'):
        model.forward_intermediates(images())


def test_drop_rates_reach_their_places():
    rates = dict(drop_path_rate=0.3, proj_drop_rate=0.1, pos_drop_rate=0.2, drop_rate=0.4)
    model = create(mlp_ratio=2.0, **rates)  # four blocks
    for i, block in enumerate(model.blocks):
        for drop_path in (block.drop_path1, block.drop_path2):  # stochastic depth grows with depth
            assert getattr(drop_path, 'drop_prob', 0.0) == pytest.approx(0.1 * i)
        assert (block.drop1.p, block.mlp.drop1.p, block.mlp.drop2.p) == (0.1, 0.1, 0.1)
    assert (model.pos_drop.p, model.head_drop.p) == (0.2, 0.4)

    def spread(**one):
        model = create(**one).train()
        torch.manual_seed(0)
        return (model(images()) - model(images())).abs().max()

    assert spread() == 0
    for name, rate in rates.items():
        assert spread(**{name: rate}) > 0, name


@pytest.mark.parametrize('kwargs', VARIANTS)
def test_torchscript_is_saved_and_loaded(tmp_path, kwargs):
    with set_scriptable(True):
        model = create(depth=2, **kwargs)
    expected = model(images())
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(images()), expected)
    for saved in (scripted, torch.jit.freeze(scripted)):
        torch.jit.save(saved, tmp_path / 'model.pt')
        torch.testing.assert_close(torch.jit.load(tmp_path / 'model.pt')(images()), expected)


def test_torchscript_learns():
    model = create(depth=2)
    torch.jit.script(model)(images()).sum().backward()
    scripted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(images()).sum().backward()
    for found, p in zip(scripted, model.parameters(), strict=True):
        torch.testing.assert_close(found, p.grad)


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::torch.jit.TracerWarning')
def test_torchscript_trace_passes_its_own_check():
    model = create(depth=2)  # traced with autograd, checked without: both graphs must be the same
    assert any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(torch.jit.trace(model, images())(images()), model(images()))


@pytest.mark.parametrize(
    'kwargs', [dict(), dict(dynamic_img_size=True), dict(dynamic_img_size=True, pos_embed='learn')]
)
def test_a_batch_without_images(kwargs):
    assert create(**kwargs)(images(B=0)).shape == (0, 5)


def test_fx():
    model = create(class_token=True, class_token_position='middle')
    traced = torch.fx.symbolic_trace(model, concrete_args={})
    torch.testing.assert_close(traced(images()), model(images()))
    torch.testing.assert_close(traced(images(B=3)), model(images(B=3)))  # the batch is not baked in
    assert any('hydra_inner' in str(n.target) for n in traced.graph.nodes)


@pytest.mark.slow
@pytest.mark.parametrize('kwargs', [dict(), dict(class_token=True, pos_embed='learn', mlp_ratio=2.0)])
def test_compile_fullgraph(kwargs):
    model = create(depth=2, **kwargs)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(images()), model(images()))
    model.zero_grad()
    compiled(images(B=3)).sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(images(B=3)).sum().backward()
    for a, p in zip(got, model.parameters()):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('kwargs', [dict(), dict(img_size=288, class_token=True)])
def test_export_with_dynamic_batch(kwargs):
    model = create(depth=2, **kwargs)
    size = kwargs.get('img_size', 64)
    exported = torch.export.export(
        model, (images(B=2, H=size, W=size),), dynamic_shapes=({0: torch.export.Dim('batch', min=1, max=64)},)
    ).module()
    for B in (1, 2, 5):
        x = images(B=B, H=size, W=size)
        torch.testing.assert_close(exported(x), model(x))
