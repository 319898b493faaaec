"""Hydra-ViT with every mixer of the family: timm's contract, other resolutions, checkpoints, errors."""

import fnmatch

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models._features_fx import create_feature_extractor
from timm.models._manipulate import group_parameters
from timm.models.vision_transformer import VisionTransformer

from hydra_vision import mixers

SMALL = dict(img_size=64, num_classes=5, depth=2)


def family() -> list:
    """Every mixer, data-dependent and data-independent where it can be both."""
    cases = []
    for name in mixers.list_mixers():
        allowed = mixers.arguments(name)
        both = 'data_dependent' in allowed
        for kwargs in [{'data_dependent': True}, {'data_dependent': False}] if both else [{}]:
            tag = '' if not both else '-dd' if kwargs['data_dependent'] else '-di'
            cases.append(pytest.param(name, kwargs, id=name + tag))
    cases += [
        pytest.param('semiseparable', dict(variant=v, share_bc=share), id=f'{v}-{share}')
        for v, share in (('causal', False), ('mult', False), ('concat', True), ('add_diag', True), ('add_shift', False))
    ]
    return cases


# parameters for each token that cannot be resampled to another grid
REFUSE = [('vandermonde', {'data_dependent': False})]


def create(name: str, kwargs: dict, **model):
    torch.manual_seed(0)
    return timm.create_model('test_hydra_vit', mixer=name, mixer_kwargs=kwargs, **{**SMALL, **model}).eval()


def images(B: int = 2, H: int = 64, W: int = 64) -> torch.Tensor:
    return torch.randn(B, 3, H, W, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(('name', 'kwargs'), family())
def test_training_step_reaches_every_parameter_with_and_without_checkpointing(name, kwargs):
    gradients = []
    for enable in (False, True):
        model = create(name, kwargs, mlp_ratio=1.0, class_token=not mixers.needs_grid(name, **kwargs)).train()
        model.set_grad_checkpointing(enable)
        out = model(images())
        assert out.shape == (2, 5)
        out.square().mean().backward()
        bad = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
        assert not bad
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)
    assert not list(model.buffers()), 'buffers would not survive loading through the meta device'


@pytest.mark.parametrize(('name', 'kwargs'), family())
def test_features_groups_and_weight_decay(name, kwargs):
    model = create(name, kwargs)
    x = images()
    with torch.no_grad():
        final, taps = model.forward_intermediates(x)
        torch.testing.assert_close(final, model.forward_features(x))
        torch.testing.assert_close(create_feature_extractor(model, {'norm': 'final'})(x)['final'], final)
    assert [t.shape for t in taps] == [(2, 64, 4, 4)] * 2
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    names = [n for n, _ in model.named_parameters()]
    assert {layers[n] for n in names if n.startswith('blocks.1.')} == {2}
    patterns = {p for p in model.no_weight_decay() if '.mixer.' in p and 'init_states' not in p}
    assert all(any(fnmatch.fnmatch(n, p) for n in names) for p in patterns)
    if name == 'm2':
        assert {n for n in names if '.filter.' in n} == {n for n in names if fnmatch.fnmatch(n, '*.mixer.filter.*')}
        assert all(any(fnmatch.fnmatch(n, p) for p in patterns) for n in names if '.filter.' in n)
    if mixers.needs_grid(name, **kwargs):
        grid_parameters = model.blocks[0].mixer.grid_parameters()
        assert {f'*.mixer.{n}' for n in grid_parameters} <= patterns


@pytest.mark.parametrize(('name', 'kwargs'), family())
def test_init_weights_after_to_empty_restores_everything(name, kwargs):
    model = create(name, kwargs, device='meta', dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {('meta', torch.float64)}
    model = model.to_empty(device='cpu')
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float('nan'))
    model.init_weights()
    assert not [n for n, p in model.named_parameters() if not torch.isfinite(p).all()]
    fresh = create(name, kwargs, dtype=torch.float64)
    for (n, a), b in zip(model.named_parameters(), fresh.parameters()):
        if a.numel() > 500:
            assert a.std().item() == pytest.approx(b.std().item(), rel=0.25), n
    assert torch.isfinite(model(images().double())).all()


@pytest.mark.parametrize(('name', 'kwargs'), family())
def test_bfloat16_model_and_autocast(name, kwargs):
    model = create(name, kwargs)
    with torch.no_grad():
        expected = model(images())
        with torch.autocast('cpu', torch.bfloat16):
            mixed = model(images())
        narrow = model.bfloat16()(images().bfloat16())
    assert narrow.dtype == torch.bfloat16
    for y in (mixed, narrow):
        assert (y.float() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(('name', 'kwargs'), family())
def test_other_resolutions(name, kwargs):
    """Fixed model carried to 96 x 80 pixels and dynamic model seeing them: the same function."""
    x = images(H=96, W=80)
    fixed, dynamic = create(name, kwargs), create(name, kwargs, dynamic_img_size=True)
    dynamic.load_state_dict(fixed.state_dict())
    if (name, kwargs) in REFUSE:
        with pytest.raises(ValueError, match='cannot be resampled to'):
            fixed.set_input_size(img_size=(96, 80))
        with pytest.raises(ValueError, match='cannot be resampled to'):
            dynamic(x)
        return
    with torch.no_grad():
        torch.testing.assert_close(dynamic(images()), fixed(images()))
        fixed.set_input_size(img_size=(96, 80))
        torch.testing.assert_close(dynamic(x), fixed(x))
        maps = dynamic.forward_intermediates(x, intermediates_only=True)
    assert [m.shape for m in maps] == [(2, 64, 6, 5)] * 2


@pytest.mark.parametrize(('name', 'kwargs'), family())
def test_checkpoint_of_another_resolution(tmp_path, name, kwargs):
    source = create(name, kwargs)
    save_file(source.state_dict(), tmp_path / 'model.safetensors')
    overlay = dict(file=str(tmp_path / 'model.safetensors'), num_classes=5, input_size=(3, 64, 64))
    pretrained = dict(pretrained=True, pretrained_cfg_overlay=overlay, img_size=96)
    if (name, kwargs) in REFUSE:
        with pytest.raises(ValueError, match='cannot be resampled to'):
            create(name, kwargs, **pretrained)
        return
    model = create(name, kwargs, **pretrained)
    source.set_input_size(img_size=(96, 96))
    with torch.no_grad():
        torch.testing.assert_close(model(images(H=96, W=96)), source(images(H=96, W=96)))


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'kwargs'), family())
def test_no_graph_breaks(name, kwargs):
    """Every mixer is traced whole; the FFT, the custom gradient and the operator also compile with their backward."""
    torch.compiler.reset()
    model = create(name, kwargs, depth=1)
    whole = name in ('cauchy', 'm2', 'semiseparable') and kwargs in ({}, {'data_dependent': True})
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager' if whole else 'eager')
    if not whole:
        with torch.no_grad():
            torch.testing.assert_close(compiled(images()), model(images()))
        return
    compiled(images()).sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(images()).sum().backward()
    for a, p in zip(got, model.parameters()):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['attention', 'cauchy', 'dft', 'm2', 'monarch', 'semiseparable', 'toeplitz'])
def test_export_with_dynamic_batch(name):
    model = create(name, {}, depth=1)
    batch = ({0: torch.export.Dim('batch', min=1, max=64)},)
    exported = torch.export.export(model, (images(),), dynamic_shapes=batch).module()
    torch.testing.assert_close(exported(images(5)), model(images(5)))


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize(('name', 'kwargs'), [
    ('toeplitz', {}), ('m2', {}), ('dft', {}), ('low_rank', {}), ('cauchy', {}), ('vandermonde', {}), ('monarch', {}),
    ('semiseparable', {'variant': 'mult'}), ('toeplitz', {'data_dependent': False}),
    ('cauchy', {'data_dependent': False}),
])  # fmt: skip
def test_a_trace_can_be_saved(tmp_path, name, kwargs):
    model = create(name, kwargs, depth=1)
    x = torch.randn(2, 3, 64, 64)
    torch.jit.save(torch.jit.trace(model, x), tmp_path / 'model.pt')
    torch.testing.assert_close(torch.jit.load(tmp_path / 'model.pt')(x + 1), model(x + 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['toeplitz', 'm2'])
def test_export_with_dynamic_image_size(name):
    model = create(name, {}, depth=1, dynamic_img_size=True)
    sides = [16 * torch.export.Dim(axis, min=2, max=64) for axis in ('h', 'w')]
    shapes = ({2: sides[0], 3: sides[1]},)
    exported = torch.export.export(model, (torch.randn(2, 3, 48, 80),), dynamic_shapes=shapes).module()
    for size in ((64, 64), (32, 48), (48, 48)):  # an even and an odd number of tokens
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


def test_vit_attention_is_timms_block():
    """The control: with position embedding, class token and MLP, timm's ViT weights give timm's ViT outputs."""
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=64, patch_size=16, embed_dim=64, depth=2, num_heads=1, num_classes=5, no_embed_class=True
    ).eval()
    ours = create('vit_attention', {}, mlp_ratio=4.0, pos_embed='learn', class_token=True, global_pool='token')
    state = {k.replace('.attn.', '.mixer.'): v for k, v in vit.state_dict().items()}
    # timm's LayerNorm has eps 1e-6 in both
    ours.load_state_dict(state, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(images()), vit(images()))


def test_wrong_arguments_are_named():
    for kwargs, error, message in (
        (dict(mixer='toplitz'), ValueError, "mixer='toplitz'; the nearest valid name is 'toeplitz'"),
        (dict(mixer='toeplitz', d_state=16), ValueError, "d_state=16: no d_state in mixer='toeplitz'"),
        (dict(mixer='toeplitz', backend='chunked'), ValueError, 'no backend in mixer='),
        (
            dict(mixer='toeplitz', mixer_kwargs=dict(data_dependant=True)),
            TypeError,
            "the nearest valid name is 'data_dependent'",
        ),
        (
            dict(mixer='toeplitz', headdim=32, mixer_kwargs=dict(headdim=16)),
            ValueError,
            'headdim=32, but mixer_kwargs',
        ),
        (dict(mixer_kwargs=dict(d_stat=16)), TypeError, "the nearest valid name is 'd_state'"),
        (dict(mixer_kwargs='d_state=16'), TypeError, "mixer_kwargs='d_state=16'; it must be a dict"),
        (
            dict(mixer='low_rank', mixer_kwargs=dict(grid_size=4)),
            ValueError,
            'grid_size=4; the model knows its tokens',
        ),
        (
            dict(mixer='low_rank', mixer_kwargs=dict(data_dependent=False), patch_drop_rate=0.5),
            ValueError,
            'patch_drop_rate=0.5',
        ),
    ):
        with pytest.raises(error, match=message):
            timm.create_model('test_hydra_vit', **SMALL, **kwargs)


def test_model_options_reach_the_mixer():
    model = create('low_rank', dict(qk_dim=8), headdim=32, expand=1, d_conv=3, mixer_bias=True)
    mixer = model.blocks[0].mixer
    assert (mixer.qk_dim, mixer.headdim, mixer.d_inner, mixer.conv1d.kernel_size) == (8, 32, 64, (3,))
    assert mixer.in_proj.bias is not None
    model = timm.create_model('test_hydra_vit', mixer_kwargs=dict(d_state=16))
    assert model.blocks[0].mixer.d_state == 16


def test_class_token_keeps_its_parameters_at_another_resolution():
    for position in ('first', 'middle', 'last'):
        model = create(
            'low_rank',
            dict(data_dependent=False),
            class_token=True,
            class_token_position=position,
            dynamic_img_size=True,
        )
        at = {'first': 0, 'middle': 8, 'last': 16}[position]
        before = model.blocks[0].mixer.q[at].clone()
        with torch.no_grad():
            expected = model(images(H=80, W=96))
            model.set_input_size(img_size=(80, 96))
            torch.testing.assert_close(model(images(H=80, W=96)), expected)
        at = {'first': 0, 'middle': 15, 'last': 30}[position]
        torch.testing.assert_close(model.blocks[0].mixer.q[at], before)
    model = create('toeplitz', dict(data_dependent=False), class_token=True, dynamic_img_size=True)
    assert model(images()).shape == (2, 5)
    with pytest.raises(ValueError, match='class token'):
        model(images(H=96))


@pytest.mark.parametrize('position', ['first', 'middle', 'last'])
def test_model_and_mixer_agree_on_the_place_of_the_class_token(position):
    for size in (48, 64):  # an odd and an even number of patches
        model = create('dense', {}, img_size=size, depth=1, class_token=True, class_token_position=position)
        seen = []
        model.blocks[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model.cls_token.fill_(1e6)
            model(torch.randn(1, 3, size, size))
        assert seen[0][0, :, 0].argmax() == model.blocks[0].mixer.tokens.prefix_start


def test_block_diagonal_mlp():
    dense, sparse = create('m2', {}, mlp_ratio=4.0), create('m2', {}, mlp='blockdiag', mlp_ratio=4.0, mlp_blocks=4)
    for layer in ('fc1', 'fc2'):
        a, b = (getattr(model.blocks[0].mlp, layer) for model in (dense, sparse))
        assert b.weight.numel() * 4 == a.weight.numel()
        blocks = torch.block_diag(*b.weight.detach()).T  # as nn.Linear has it
        x = torch.randn(3, 7, blocks.shape[1])
        torch.testing.assert_close(b(x), torch.nn.functional.linear(x, blocks, b.bias))
        assert b.weight.std().item() == pytest.approx(2 * a.weight.std().item(), rel=0.1)
    assert sparse(images()).shape == (2, 5)
    for kwargs, message in (
        (dict(mlp='blockdiag'), 'needs an mlp_ratio'),
        (dict(mlp='blockdiag', mlp_ratio=4.0, mlp_blocks=3), 'blocks=3; it must divide the widths 64 and 256'),
        (dict(mlp_blocks=2), "needs mlp='blockdiag'"),
        (dict(mlp='monarch'), "mlp='monarch'; allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            create('m2', {}, **kwargs)
