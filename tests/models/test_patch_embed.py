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


@pytest.mark.parametrize(('size', 'kwargs'), [
    ((32, 48), {}),
    ((32, 48), {'strict_img_size': False, 'output_fmt': 'NHWC'}),
    ((35, 41), {'strict_img_size': False, 'dynamic_img_pad': True}),
    ((35, 41), {'img_size': (35, 41)}),  # what no whole patch covers is left out
    ((32, 48), {'in_chans': 1}),
    ((32, 48), {'patch_size': (4, 8)}),
    ((32, 48), {'bias': False}),
], ids=str)  # fmt: skip
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
def test_result_and_gradients_are_timms(size, kwargs, layout):
    theirs, ours = pair(**{'img_size': (32, 48), 'patch_size': 8, 'embed_dim': 24, **kwargs})
    x = torch.randn(3, kwargs.get('in_chans', 3), *size, dtype=torch.float64).contiguous(memory_format=layout)
    expected, found = theirs(x), ours(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    grads = [torch.autograd.grad((m(x) * weight).sum(), list(m.parameters())) for m in (theirs, ours)]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-10, atol=1e-10)


def test_tokens_are_contiguous():
    assert PatchEmbed(32, 8, 3, 24)(torch.randn(2, 3, 32, 32)).is_contiguous()


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
