"""The masked autoencoder: what steps are scaled by, that scaling is what it says, that it learns, the command."""

import csv

import pytest
import timm
import torch
import torch.nn.functional as F

import hydra_vision  # noqa: F401
from benchmarks.masked_autoencoder import MaskedAutoencoder, ScaledSteps, main, step_scales
from hydra_vision import Hydra
from hydra_vision.errors import UserError


def test_scales():
    kept = torch.tensor([[0, 3, 4], [2, 5, 7]])
    assert step_scales('unscaled', kept, 9) is None
    assert torch.equal(step_scales('rate', kept, 9), torch.full((2, 3, 2), 3.0))
    ahead, behind = step_scales('gap', kept, 9).unbind(-1)
    assert ahead.tolist() == [[3, 1, 5], [3, 2, 2]]  # up to the end of the sequence
    assert behind.tolist() == [[1, 3, 1], [3, 3, 2]]  # from its start


def test_scaled_steps_are_the_steps_of_a_mixer():
    torch.manual_seed(0)
    mixer = Hydra(16, d_state=4, headdim=8).double()
    u, scale = torch.randn(2, 5, 16).double(), 1 + 4 * torch.rand(2, 5, 2).double()
    plain = mixer.in_proj(u)
    with torch.no_grad():
        mixer.dt_bias += 2  # not all steps are small
    step = lambda raw: F.softplus(raw[..., -2 * mixer.nheads :].unflatten(-1, (2, -1)) + mixer.dt_bias)  # noqa: E731
    mixer.in_proj = ScaledSteps(mixer)
    assert torch.equal(mixer.in_proj(u), plain)
    mixer.in_proj.scale = scale
    scaled = mixer.in_proj(u)
    assert torch.equal(scaled[..., : -2 * mixer.nheads], plain[..., : -2 * mixer.nheads])
    torch.testing.assert_close(step(scaled), step(plain) * scale.unsqueeze(-1))


def test_the_model_sees_the_kept_patches_only_and_learns():
    torch.manual_seed(0)
    options = dict(img_size=8, patch_size=2, in_chans=1, num_classes=0, depth=2, headdim=32, d_state=16)
    encoder = timm.create_model('test_hydra_vit', pos_embed='learn', **options)
    model = MaskedAutoencoder(encoder, 'gap')
    images = torch.randn(4, 1, 1, 1).expand(4, 1, 8, 8) + 0.1 * torch.randn(4, 1, 8, 8)
    kept = torch.tensor([[0, 5, 9, 15]]).expand(4, -1)
    changed = images.clone()
    changed[:, :, 0, 2:] += 1  # patches 1 to 3
    assert torch.equal(model.encode(images, kept), model.encode(changed, kept))
    whole = encoder.forward_features(images)
    torch.testing.assert_close(model.encode(images, torch.arange(16).expand(4, -1)), whole)  # gaps of one
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        losses.append(model(images))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_the_command(tmp_path):
    arguments = ['--steps', 'gap', '--patch-size', '4', '--mask-ratio', '0.5', '--epochs', '1', '--seeds', '0']
    assert main([*arguments, '--output', str(tmp_path / 'out')]) == 0
    with (tmp_path / 'out' / 'masked_autoencoder.csv').open(newline='') as file:
        (row,) = csv.DictReader(file)
    assert row['steps'] == 'gap'
    assert all(10 < float(row[name]) <= 100 for name in row if name.startswith(('before', 'after')))
    for given, message in ((['--steps', 'gaps'], "--steps 'gaps'; allowed"), (['--mask-ratio', '1'], 'mask-ratio 1')):
        with pytest.raises(UserError, match=message):
            main([*given, '--output', str(tmp_path / 'other')])
