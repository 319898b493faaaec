"""The patch embedding against timm's."""

import pytest
import torch
from timm.layers import PatchEmbed as TimmPatchEmbed

from hydra_vision.models._patch_embed import PatchEmbed


def pair(**kwargs):
    """timm's and ours with the same parameters."""
    theirs = TimmPatchEmbed(**kwargs).double()
    ours = PatchEmbed(**kwargs).double()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize('kwargs', [
    {},
    {'strict_img_size': False, 'output_fmt': 'NHWC'},
    {'strict_img_size': False, 'dynamic_img_pad': True},
    {'in_chans': 1},
    {'patch_size': (4, 8)},
    {'bias': False},
], ids=str)  # fmt: skip
def test_result_and_gradients_are_timms(kwargs):
    theirs, ours = pair(**{'img_size': (32, 48), 'patch_size': 8, 'embed_dim': 24, **kwargs})
    x = torch.randn(3, kwargs.get('in_chans', 3), 32, 48, dtype=torch.float64)
    expected, found = theirs(x), ours(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    grads = [torch.autograd.grad((m(x) * weight).sum(), list(m.parameters())) for m in (theirs, ours)]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-10, atol=1e-10)


def test_tokens_are_contiguous():
    assert PatchEmbed(32, 8, 3, 24)(torch.randn(2, 3, 32, 32)).is_contiguous()


def test_what_no_whole_patch_covers_is_left_out_as_timm_does():
    theirs, ours = pair(img_size=(35, 41), patch_size=8, embed_dim=24)
    x = torch.randn(2, 3, 35, 41, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_padding_of_other_sizes():
    theirs, ours = pair(img_size=32, patch_size=8, embed_dim=24, strict_img_size=False, dynamic_img_pad=True)
    x = torch.randn(2, 3, 35, 41, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_other_patch_size():
    theirs, ours = pair(img_size=32, patch_size=8, embed_dim=24)
    for embed in (theirs, ours):
        embed.set_input_size(img_size=64, patch_size=16)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    assert type(ours.proj) is type(PatchEmbed(64, 16, 3, 24).proj)


def test_images_of_other_channels_are_named():
    with pytest.raises(AssertionError, match=r'Input channels \(1\) do not match model \(3\)'):
        PatchEmbed(32, 8, 3, 24)(torch.randn(2, 1, 32, 32))


def test_channels_last_images():
    theirs, ours = pair(img_size=32, patch_size=8, embed_dim=24)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x.contiguous(memory_format=torch.channels_last)), theirs(x))
