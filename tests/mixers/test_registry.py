"""Mixers by name: what there is, what each takes, errors that say what to do."""

import pytest
import torch

from hydra_vision import mixers


def test_the_family():
    for name in mixers.list_mixers():
        allowed = mixers.arguments(name)
        assert not {'d_model', 'device', 'dtype', 'kwargs', 'self'} & set(allowed)
        if 'data_dependent' in allowed:
            assert not mixers.needs_grid(name)
            assert mixers.needs_grid(name, data_dependent=False)
        assert mixers.needs_grid(name) == ('grid_size' in mixers.layout_arguments(name))
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
        (
            'vit_attention',
            dict(projection='toeplitz'),
            ValueError,
            "projection='toeplitz'; allowed: 'dense', 'monarch'",
        ),
        ('semiseparable', dict(conv='both'), ValueError, "conv='both'; allowed: 'centred', 'causal'"),
        ('checkpoint', dict(checkpoint='first'), ValueError, "checkpoint='first'; allowed: 'mean', 'last'"),
        ('checkpoint', dict(segment=0), ValueError, 'segment=0; allowed: a number of tokens'),
        ('checkpoint', dict(segment=(2, 0)), ValueError, r'segment=\(2, 0\); allowed'),
        ('checkpoint', dict(segment=(2, 2)), ValueError, r'grid_size=None: segment=\(2, 2\) needs grid_size'),
        ('checkpoint', dict(grid_size=(4, 4)), ValueError, r"grid_size=\(4, 4\): segment='sqrt' has no use for it"),
        ('checkpoint', dict(headdim=48), ValueError, 'headdim=48 does not divide d_model=64'),
        ('scout', dict(linear='toeplitz'), ValueError, "linear='toeplitz'; allowed: 'hydra'"),
        ('scout', dict(linear_kwargs=dict(d_stat=4)), TypeError, "linear='hydra' takes no argument 'd_stat'"),
        ('scout', dict(linear_kwargs=dict(headdim=4)), ValueError, 'linear_kwargs has headdim=4'),
        ('mamba', dict(d_state=0), ValueError, 'd_state=0; it must be at least 1'),
        ('mamba', dict(dt_max=0.0001), ValueError, 'dt_max=0.0001'),
        ('vim', dict(backend='cuda'), ValueError, "unknown backend 'cuda'"),
        ('m2', dict(wrapper='theirs'), ValueError, "wrapper='theirs'; allowed: 'gated', 'm2'"),
        ('m2', dict(residual_conv=True), ValueError, "residual_conv=True; it needs wrapper='m2'"),
    ],
)
def test_errors_say_what_is_allowed(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        mixers.create(name, 64, **kwargs)


def test_torchscript_is_rejected_clearly():
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


@pytest.mark.parametrize(
    ('mixer', 'kwargs', 'expected'),
    [
        ('hydra', None, [('hydra', {})] * 4),
        (['hydra', 'cauchy'], dict(headdim=16), [('hydra', dict(headdim=16)), ('cauchy', dict(headdim=16))] * 2),
        ('cauchy', [None, dict(qk_dim=4)], [('cauchy', {}), ('cauchy', dict(qk_dim=4))] * 2),
        (
            ('hydra', 'hydra', 'hydra', 'vit_attention'),
            (None, dict(d_state=8)),
            [('hydra', {}), ('hydra', dict(d_state=8)), ('hydra', {}), ('vit_attention', dict(d_state=8))],
        ),
    ],
)
def test_patterns(mixer, kwargs, expected):
    if any(name == 'vit_attention' and 'd_state' in given for name, given in expected):
        with pytest.raises(TypeError, match="mixer='vit_attention' takes no argument 'd_state'"):
            mixers.repeat_pattern(mixer, kwargs, 4)
        return
    blocks = mixers.repeat_pattern(mixer, kwargs, 4)
    assert blocks == expected
    assert len({id(given) for _, given in blocks}) == 4  # to be changed apart


@pytest.mark.parametrize(
    ('mixer', 'kwargs', 'error', 'message'),
    [
        (('hydra', 'cauchy', 'dft'), None, ValueError, 'a pattern of 3 does not divide depth=4'),
        ((), None, ValueError, r'mixer=\(\): a pattern of 0'),
        ('hydra', [{}] * 3, ValueError, r'mixer_kwargs=\[.*\]: a pattern of 3 does not divide depth=4'),
        (7, None, TypeError, 'mixer=7; it must be a name or a sequence of names'),
        (['hydra', 7], None, TypeError, 'it must be a name or a sequence of names'),
        ('hydra', 'd_state=4', TypeError, "mixer_kwargs='d_state=4'; it must be a dict or a sequence of dicts"),
        (('hydra', 'caushy'), None, ValueError, "mixer='caushy'; the nearest valid name is 'cauchy'"),
    ],
)
def test_bad_patterns(mixer, kwargs, error, message):
    with pytest.raises(error, match=message):
        mixers.repeat_pattern(mixer, kwargs, 4)
