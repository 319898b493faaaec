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


def family() -> dict:
    """Every mixer, data-dependent and data-independent where it can be both; and hybrids."""
    cases = {}
    for name in mixers.list_mixers():
        if 'data_dependent' in mixers.arguments(name):
            cases |= {f'{name}-dd': (name, dict(data_dependent=True)), f'{name}-di': (name, dict(data_dependent=False))}
        else:
            cases[name] = (name, {})
    for variant, share in (
        ('causal', False),
        ('mult', False),
        ('concat', True),
        ('add_diag', True),
        ('add_shift', False),
    ):
        cases[f'{variant}-{share}'] = ('semiseparable', dict(variant=variant, share_bc=share))
    cases['checkpoint-grid'] = ('checkpoint', dict(segment=(2, 3)))
    cases['scout-grid'] = ('scout', dict(segment=(3, 2), checkpoint='last', linear='vim'))
    cases['m2-own'] = ('m2', dict(wrapper='m2'))
    cases['monarch-projections'] = ('vit_attention', dict(projection='monarch'))
    cases['hydra+attention'] = (('hydra', 'vit_attention'), {})
    cases['scout-two-blocks'] = (('hydra', 'checkpoint'), (None, dict(segment=(2, 2))))
    cases['hydra+toeplitz'] = (('hydra', 'toeplitz'), [{}, dict(data_dependent=False)])
    return cases


FAMILY = family()
# parameters for each token that cannot be resampled to another grid
FIXED_GRID = ('vandermonde-di',)


def knows_grid(case: str) -> bool:
    blocks = mixers.repeat_pattern(*FAMILY[case], 2)
    return any(mixers.needs_grid(name, **kwargs) for name, kwargs in blocks)


every_case = pytest.mark.parametrize('case', FAMILY)
grid_cases = pytest.mark.parametrize('case', [case for case in FAMILY if knows_grid(case)])


def create(name, kwargs, **model):
    torch.manual_seed(0)
    return timm.create_model('test_hydra_vit', mixer=name, mixer_kwargs=kwargs, **{**SMALL, **model}).eval()


def images(B: int = 2, H: int = 64, W: int = 64) -> torch.Tensor:
    return torch.randn(B, 3, H, W, generator=torch.Generator().manual_seed(1))


@every_case
def test_training_step_reaches_every_parameter_with_and_without_checkpointing(case):
    gradients = []
    for enable in (False, True):
        model = create(*FAMILY[case], mlp_ratio=1.0, class_token=not knows_grid(case)).train()
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


@every_case
def test_features_groups_and_weight_decay(case):
    model = create(*FAMILY[case])
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
    undecayed = {n for n in names if any(fnmatch.fnmatch(n, p) for p in patterns)}
    asked_for = {f'blocks.{i}.mixer.{n}' for i, blk in enumerate(model.blocks) for n in blk.mixer.no_weight_decay()}
    assert undecayed == asked_for - {n for n in asked_for if 'init_states' in n}
    grid_parameters = {
        f'blocks.{i}.mixer.{n}' for i, blk in enumerate(model.blocks) for n in blk.mixer.grid_parameters()
    }
    assert grid_parameters <= undecayed


@every_case
def test_init_weights_after_to_empty_restores_everything(case):
    name, kwargs = FAMILY[case]
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


@pytest.mark.parametrize('case', ['hydra', 'checkpoint', *(case for case in FAMILY if knows_grid(case))])
def test_other_resolutions(case):
    """Fixed model resized to 96 x 80 pixels and dynamic model seeing them: the same function."""
    name, kwargs = FAMILY[case]
    x = images(H=96, W=80)
    fixed, dynamic = create(name, kwargs), create(name, kwargs, dynamic_img_size=True)
    dynamic.load_state_dict(fixed.state_dict())
    if case in FIXED_GRID:
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


@grid_cases
def test_checkpoint_of_another_resolution(tmp_path, case):
    name, kwargs = FAMILY[case]
    source = create(name, kwargs)
    save_file(source.state_dict(), tmp_path / 'model.safetensors')
    overlay = dict(file=str(tmp_path / 'model.safetensors'), num_classes=5, input_size=(3, 64, 64))
    pretrained = dict(pretrained=True, pretrained_cfg_overlay=overlay, img_size=96)
    if case in FIXED_GRID:
        with pytest.raises(ValueError, match='cannot be resampled to'):
            create(name, kwargs, **pretrained)
        return
    model = create(name, kwargs, **pretrained)
    source.set_input_size(img_size=(96, 96))
    with torch.no_grad():
        torch.testing.assert_close(model(images(H=96, W=96)), source(images(H=96, W=96)))


def create_all(**model):
    """One model with every mixer in a block of its own, data-independent ones at the end."""
    blocks = [mixers.repeat_pattern(*FAMILY[case], 1)[0] for case in FAMILY if isinstance(FAMILY[case][0], str)]
    names, kwargs = zip(*blocks)
    return create(names, kwargs, depth=len(blocks), **model)


@pytest.mark.slow
def test_no_graph_breaks():
    """Every mixer is traced whole and compiles with its backward pass."""
    torch.compiler.reset()
    model = create_all()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    gradients = []
    for forward in (compiled, model):
        model.zero_grad()
        forward(images()).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_export_with_dynamic_batch():
    model = create_all()
    batch = ({0: torch.export.Dim('batch', min=1, max=64)},)
    exported = torch.export.export(model, (images(),), dynamic_shapes=batch).module()
    torch.testing.assert_close(exported(images(5)), model(images(5)), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::torch.jit.TracerWarning')
def test_a_trace_can_be_saved(tmp_path):
    model = create_all()
    x = torch.randn(2, 3, 64, 64)
    torch.jit.save(torch.jit.trace(model, x), tmp_path / 'model.pt')
    torch.testing.assert_close(torch.jit.load(tmp_path / 'model.pt')(x + 1), model(x + 1), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['toeplitz', 'm2', 'vim', 'checkpoint'])
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
        (dict(mixer='toeplitz', d_state=16), ValueError, "d_state=16: no d_state in mixer='toeplitz'"),
        (dict(mixer='toeplitz', backend='chunked'), ValueError, 'no backend in mixer='),
        (dict(mixer='toeplitz', mixer_kwargs=dict(data_dependant=True)), TypeError, "is 'data_dependent'"),
        (
            dict(mixer='toeplitz', headdim=32, mixer_kwargs=dict(headdim=16)),
            ValueError,
            'headdim=32, but mixer_kwargs',
        ),
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


def test_blocks_take_turns():
    model = create(('hydra', 'hydra', 'hydra', 'vit_attention'), None, depth=8, headdim=32, d_state=16)
    kinds = [type(blk.mixer).__name__ for blk in model.blocks]
    assert kinds == ['Hydra', 'Hydra', 'Hydra', 'VitAttention'] * 2
    assert (model.blocks[0].mixer.d_state, model.blocks[3].mixer.headdim) == (16, 32)
    again = create(('hydra', 'hydra', 'hydra', 'vit_attention'), None, depth=8, headdim=32, d_state=16)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(images()), model(images()))
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(images()))
        for blk in model.blocks:
            x = x + blk.mixer(blk.norm1(x))
        torch.testing.assert_close(model.forward_features(images()), model.norm(x))


def test_hybrids_of_scriptable_mixers_are_scriptable():
    model = create(('hydra', 'vit_attention'), None)
    torch.testing.assert_close(torch.jit.script(model)(images()), model(images()))


def test_defaults_are_those_of_each_mixer():
    model = create(('hydra', 'mamba'), None)
    hydra, mamba = (blk.mixer for blk in model.blocks)
    assert (hydra.d_state, hydra.d_conv, mamba.d_state, mamba.conv1d.kernel_size) == (64, 7, 16, (4,))
    model = create(('hydra', 'mamba'), (dict(d_state=32), None), d_conv=5)
    hydra, mamba = (blk.mixer for blk in model.blocks)
    assert (hydra.d_state, hydra.d_conv, mamba.d_state, mamba.conv1d.kernel_size) == (32, 5, 16, (5,))


def test_segments_on_the_grid_need_patches_by_rows():
    with pytest.raises(ValueError, match="scan_order='hilbert': mixer='checkpoint' needs patches by rows"):
        create('checkpoint', dict(segment=(2, 2)), scan_order='hilbert')
    model = create('checkpoint', dict(segment=4), scan_order='hilbert')
    assert model(images()).shape == (2, 5)


@pytest.mark.parametrize(('blocks', 'rows', 'columns'), [(1, 12, 24), (2, 12, 24), (4, 24, 12), (6, 12, 12)])
def test_monarch_linear(blocks, rows, columns):
    """B2 P B1 as dense matrices: P transposes blocks and the columns inside them."""
    layer = mixers.MonarchLinear(rows, columns, blocks)
    torch.nn.init.normal_(layer.bias)
    B1, B2 = (torch.block_diag(*w.detach().mT) for w in (layer.weight1, layer.weight2))
    P = torch.eye(B1.shape[0])[torch.arange(B1.shape[0]).view(blocks, -1).T.flatten()]
    x = torch.randn(3, 5, rows)
    torch.testing.assert_close(layer(x), x @ (B2 @ P @ B1).T + layer.bias)
    with pytest.raises(ValueError, match='blocks=5; it must divide the widths 12 and 24'):
        mixers.MonarchLinear(12, 24, 5)


@pytest.mark.parametrize(
    ('name', 'kwargs', 'millions'),
    [
        ('m2_vit_base', {}, 47.2),  # the paper: 45
        ('hydra_vit_base', dict(mixer_kwargs=dict(projection='monarch'), mlp='monarch'), 33.5),  # ViT-b + Monarch: 33
        ('hydra_vit_base', dict(mixer_kwargs=None, mlp='dense'), 86.6),  # ViT-b: 87
    ],
)
def test_parameters_of_the_monarch_mixer_papers_rows(name, kwargs, millions):
    vit = dict(mixer='vit_attention', depth=12, mlp_ratio=4, pos_embed='learn', class_token=True)
    model = timm.create_model(name, device='meta', **(vit if name == 'hydra_vit_base' else {}), **kwargs)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)


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
        (dict(mlp='monarch'), "mlp='monarch' needs an mlp_ratio"),
        (dict(mlp='toeplitz'), "mlp='toeplitz'; allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            create('m2', {}, **kwargs)
