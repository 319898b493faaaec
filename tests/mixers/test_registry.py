"""Mixers by name: what there is, what each takes, errors that say what to do."""

import pytest
import torch

from hydra_vision import mixers


def test_the_family():
    names = 'hydra quasiseparable semiseparable attention vit_attention low_rank cauchy vandermonde toeplitz dense m2'
    assert mixers.list_mixers() == sorted([*names.split(), 'dft', 'monarch'])
    for name in mixers.list_mixers():
        allowed = mixers.arguments(name)
        assert not {'d_model', 'device', 'dtype', 'wrapper', 'kwargs', 'self'} & set(allowed)
        if 'data_dependent' in allowed:
            assert not mixers.needs_grid(name)
            assert mixers.needs_grid(name, data_dependent=False)
        grid = dict(grid_size=(4, 4)) if mixers.needs_grid(name) else {}
        mixer = mixers.create(name, 64, **grid)
        u = torch.randn(2, 16, 64)
        assert mixer(u).shape == (2, 16, 64)
        assert mixer.matrix(u).shape[-2:] == (16, 16)


@pytest.mark.parametrize(
    ('name', 'kwargs', 'error', 'message'),
    [
        ('caushy', {}, ValueError, r"mixer='caushy'; the nearest valid name is 'cauchy'; allowed: attention, cauchy, "),
        ('xyz', {}, ValueError, "mixer='xyz'; allowed: attention"),
        (
            'cauchy',
            dict(qkdim=4),
            TypeError,
            r"takes no argument 'qkdim'; the nearest valid name is 'qk_dim'; it takes: bias",
        ),
        ('quasiseparable', dict(variant='add'), TypeError, "takes no argument 'variant'"),
        ('cauchy', dict(data_dependent=False), ValueError, r'Cauchy: .* needs grid_size=\(H, W\)'),
        ('dense', {}, ValueError, r'Dense: .* needs grid_size'),
        ('cauchy', dict(grid_size=4), ValueError, 'grid_size=4, .* leave them out'),
        ('low_rank', dict(num_prefix_tokens=1), ValueError, 'num_prefix_tokens=1.* leave them out'),
        ('low_rank', dict(qk_dim=0), ValueError, 'qk_dim=0'),
        ('toeplitz', dict(d_conv=4), ValueError, 'd_conv=4; it must be odd'),
        ('toeplitz', dict(headdim=48), ValueError, 'headdim=48 does not divide d_inner=128'),
        ('toeplitz', dict(headdim=0), ValueError, 'headdim=0'),
        ('m2', dict(filter_bands=0), ValueError, 'filter_bands=0'),
        ('semiseparable', dict(variant='both'), ValueError, "variant='both'; allowed: 'causal', 'add'"),
        ('semiseparable', dict(variant='causal', share_bc=True), ValueError, 'nothing to share'),
        ('semiseparable', dict(variant='concat', headdim=128), ValueError, 'even number of heads'),
        ('semiseparable', dict(ngroups=3), ValueError, 'ngroups=3 does not divide the number of heads 2'),
        ('semiseparable', dict(d_state=0), ValueError, 'd_state=0'),
        ('semiseparable', dict(dt_limit=(1, 0)), ValueError, 'dt_limit'),
        ('semiseparable', dict(dt_min=0), ValueError, 'dt_min=0'),
        ('semiseparable', dict(backend='cuda'), ValueError, "unknown backend 'cuda'"),
        ('vit_attention', dict(num_heads=0), ValueError, 'num_heads=0'),
    ],
)
def test_errors_say_what_is_allowed(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        mixers.create(name, 64, **kwargs)


def test_torchscript_is_refused_clearly():
    with pytest.raises(RuntimeError, match='use torch'):
        torch.jit.script(mixers.create('toeplitz', 64))


def test_a_named_backend_is_obeyed():
    u = torch.randn(2, 33, 64, dtype=torch.float64)
    for variant in ('causal', 'concat', 'quasiseparable'):
        mixer = mixers.create('semiseparable', 64, variant=variant, headdim=32, dtype=torch.float64)
        expected = mixer(u)
        mixer.backend = 'reference'
        torch.testing.assert_close(mixer(u), expected)
        mixer.backend = 'nothing'
        with pytest.raises(ValueError, match='nothing'):
            mixer(u)
