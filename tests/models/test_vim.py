"""Vim's models: sizes, initialisation, and published checkpoints, from their names, shapes and formulas."""

import argparse
import fnmatch

import pytest
import timm
import torch
import torch.nn.functional as F

from hydra_vision.models import VisionMamba
from hydra_vision.models.vim import checkpoint_filter_fn
from hydra_vision.ops.selective_scan import scan_recurrence

D, DEPTH, PATCHES, N, R, E = 32, 3, 16, 16, 2, 64


def create(**kwargs) -> VisionMamba:
    torch.manual_seed(0)
    small = dict(img_size=64, embed_dim=D, depth=DEPTH, num_classes=5)
    return timm.create_model('vim_tiny_patch16_224', **{**small, **kwargs}).eval()


def released() -> dict:
    """A checkpoint with the names and shapes of the released ones, small and random."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator) * 0.2

    state = {
        'cls_token': randn(1, 1, D),
        'pos_embed': randn(1, PATCHES + 1, D),
        'patch_embed.proj.weight': randn(D, 3, 16, 16),
        'patch_embed.proj.bias': randn(D),
        'head.weight': randn(5, D),
        'head.bias': randn(5),
        'norm_f.weight': 1 + randn(D),
    }
    for i in range(DEPTH):
        layer = {
            'norm.weight': 1 + randn(D),
            'mixer.in_proj.weight': randn(2 * E, D),
            'mixer.out_proj.weight': randn(D, E),
        }
        for b, A in (('', 'A_log'), ('_b', 'A_b_log')):
            layer[f'mixer.{A}'] = torch.arange(1.0, N + 1).log().repeat(E, 1) + randn(E, N)
            layer[f'mixer.D{b}'] = 1 + randn(E)
            layer[f'mixer.conv1d{b}.weight'] = randn(E, 1, 4)
            layer[f'mixer.conv1d{b}.bias'] = randn(E)
            layer[f'mixer.x_proj{b}.weight'] = randn(R + 2 * N, E)
            layer[f'mixer.dt_proj{b}.weight'] = randn(E, R)
            layer[f'mixer.dt_proj{b}.bias'] = randn(E) - 4
        state.update({f'layers.{i}.{name}': value for name, value in layer.items()})
    return state


def released_forward(s: dict, images: torch.Tensor) -> torch.Tensor:
    """The released model by its formulas: add, then norm, then mixer; the class token among the positions."""

    def rms(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    def direction(x, z, p, b, A):
        x = F.conv1d(F.pad(x.mT, (3, 0)), s[f'{p}conv1d{b}.weight'], s[f'{p}conv1d{b}.bias'], groups=E).mT
        x = F.silu(x)
        r, B, C = (x @ s[f'{p}x_proj{b}.weight'].T).split([R, N, N], -1)
        dt = F.softplus(r @ s[f'{p}dt_proj{b}.weight'].T + s[f'{p}dt_proj{b}.bias'])
        return (scan_recurrence(x, dt, -s[f'{p}{A}'].exp(), B, C) + s[f'{p}D{b}'] * x) * F.silu(z)

    x = F.conv2d(images, s['patch_embed.proj.weight'], s['patch_embed.proj.bias'], stride=16).flatten(2).mT
    middle = PATCHES // 2
    x = torch.cat([x[:, :middle], s['cls_token'].expand(x.shape[0], -1, -1), x[:, middle:]], 1) + s['pos_embed']
    residual, hidden = None, x
    for i in range(DEPTH):
        residual = hidden if residual is None else residual + hidden
        p = f'layers.{i}.mixer.'
        u, z = (rms(residual, s[f'layers.{i}.norm.weight']) @ s[f'{p}in_proj.weight'].T).chunk(2, -1)
        y = direction(u, z, p, '', 'A_log') + direction(u.flip(1), z.flip(1), p, '_b', 'A_b_log').flip(1)
        hidden = y / 2 @ s[f'{p}out_proj.weight'].T
    x = rms(residual + hidden, s['norm_f.weight'])
    return x[:, middle] @ s['head.weight'].T + s['head.bias']


@pytest.mark.parametrize('img_size', [64, 96])
def test_a_released_checkpoint_gives_the_released_outputs(tmp_path, img_size):
    state = released()
    path = tmp_path / 'vim.pth'
    torch.save({'model': state, 'epoch': 299, 'args': argparse.Namespace(lr=1e-3)}, path)
    overlay = dict(file=str(path), num_classes=5)
    model = create(pretrained=True, pretrained_cfg_overlay=overlay, img_size=img_size)
    images = torch.randn(2, 3, img_size, img_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        if img_size == 64:
            torch.testing.assert_close(model(images), released_forward(state, images), rtol=1e-4, atol=1e-5)
        assert model(images).shape == (2, 5)


def test_our_own_checkpoint_is_left_alone():
    model = create()
    again = checkpoint_filter_fn(model.state_dict(), model)
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(('name', 'millions'), [('tiny', 7.15), ('small', 25.8), ('base', 97.6)])
def test_parameter_counts(name, millions):
    model = timm.create_model(f'vim_{name}_patch16_224', device='meta')
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)


def test_initialisation_is_the_released_one():
    model = create(embed_dim=256, depth=4, device='meta').to_empty(device='cpu')
    model.init_weights()
    mixer = model.blocks[0].mixer
    assert torch.equal(mixer.A_b_log, torch.arange(1.0, 17).log().expand(512, 16))
    assert torch.equal(mixer.D_b, torch.ones(512))
    dt = F.softplus(mixer.dt_proj_b.bias)
    assert 0.99e-3 < dt.min() < dt.max() < 0.101
    assert mixer.dt_proj.weight.abs().max() <= 16**-0.5
    assert mixer.in_proj.weight.std().item() == pytest.approx((1 / 3 / 256) ** 0.5, rel=0.05)
    assert mixer.out_proj.weight.std().item() == pytest.approx((1 / 3 / 512) ** 0.5 / 2, rel=0.05)
    for weight in (model.head.weight, model.patch_embed.proj.weight, model.pos_embed, model.cls_token):
        assert weight.std().item() == pytest.approx(0.02, rel=0.2)
    before = mixer.out_proj.weight.std()
    model.init_weights(needs_reset=False)  # not divided twice
    assert mixer.out_proj.weight.std().item() == pytest.approx(before.item(), rel=0.05)


def test_the_residual_stream_stays_wide_under_autocast():
    model = create()
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast('cpu', torch.bfloat16):
        model(torch.randn(1, 3, 64, 64))
    assert set(seen) == {torch.float32}


def test_timms_contract():
    model = create(dynamic_img_size=True)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        final, taps = model.forward_intermediates(x)
        torch.testing.assert_close(final, model.forward_features(x))
        torch.testing.assert_close(model.forward_head(final), model(x))
        assert [t.shape for t in taps] == [(2, D, 4, 6)] * DEPTH
        fixed = create()
        fixed.load_state_dict(model.state_dict())
        fixed.set_input_size((64, 96))
        torch.testing.assert_close(fixed(x), model(x))
    features = create(features_only=True, out_indices=(0, 2))
    assert [f.shape for f in features(torch.randn(1, 3, 64, 64))] == [(1, D, 4, 4)] * 2
    model.reset_classifier(3, 'avg')
    assert model(x).shape == (2, 3)
    names = [n for n, _ in model.named_parameters()]
    undecayed = {n for n in names if any(fnmatch.fnmatch(n, p) for p in model.no_weight_decay())}
    ends = ('A_log', 'A_b_log', '.D', '.D_b', 'dt_proj.bias', 'dt_proj_b.bias', 'pos_embed', 'cls_token')
    assert undecayed == {n for n in names if n.endswith(ends)}


@pytest.mark.parametrize('checkpointing', [False, True])
def test_training_step_reaches_every_parameter(checkpointing):
    model = create(drop_path_rate=0.1).train()
    model.set_grad_checkpointing(checkpointing)
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]


@pytest.mark.slow
def test_export_with_dynamic_batch():
    model = create()
    shapes = ({0: torch.export.Dim('batch', min=1, max=64)},)
    exported = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=shapes).module()
    x = torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)
