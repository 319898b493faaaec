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


BAD = {
    'cauchy': [dict(qkdim=4), dict(data_dependent=False), dict(grid_size=4)],
    'dense': [dict()],  # grid_size is missing
    'low_rank': [dict(num_prefix_tokens=1), dict(qk_dim=0)],
    'toeplitz': [dict(d_conv=4), dict(headdim=48), dict(headdim=0)],
    'm2': [dict(filter_bands=0), dict(wrapper='theirs'), dict(residual_conv=True)],
    'quasiseparable': [dict(variant='add')],
    'semiseparable': [
        *(dict(variant='both'), dict(share_bc=True, variant='causal'), dict(headdim=128, variant='concat')),
        *(dict(ngroups=3), dict(d_state=0), dict(dt_limit=(1, 0)), dict(dt_min=0), dict(backend='cuda')),
        dict(conv='both'),
    ],
    'vit_attention': [dict(num_heads=0), dict(projection='toeplitz')],
    'checkpoint': [
        *(dict(checkpoint='first'), dict(segment=0), dict(segment=(2, 0)), dict(segment=(2, 2))),
        *(dict(grid_size=(4, 4)), dict(headdim=48)),
    ],
    'scout': [dict(linear='toeplitz'), dict(linear_kwargs=dict(d_stat=4)), dict(linear_kwargs=dict(headdim=4))],
    'mamba': [dict(d_state=0), dict(dt_max=0.0001)],
    'vim': [dict(backend='cuda')],
}


@pytest.mark.parametrize(
    ('name', 'kwargs'), [(name, kwargs) for name, cases in BAD.items() for kwargs in cases], ids=str
)
def test_errors_name_the_argument(name, kwargs):
    argument = next(iter(kwargs.get('linear_kwargs', kwargs)), 'grid_size')
    word = {'share_bc': 'share', 'headdim': 'head', 'data_dependent': 'grid_size'}.get(argument, argument)
    with pytest.raises((TypeError, ValueError), match=word):
        mixers.create(name, 64, **kwargs)


def test_errors_bring_the_nearest_name():
    with pytest.raises(ValueError, match=r"mixer='caushy'; the nearest valid name is 'cauchy'; allowed: attention"):
        mixers.create('caushy', 64)
    with pytest.raises(TypeError, match="no argument 'qkdim'; the nearest valid name is 'qk_dim'; it takes: bias"):
        mixers.create('cauchy', 64, qkdim=4)
    with pytest.raises(ValueError, match="variant='both'; allowed: 'causal', 'add'"):
        mixers.create('semiseparable', 64, variant='both')


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
    ],
)
def test_patterns(mixer, kwargs, expected):
    blocks = mixers.repeat_pattern(mixer, kwargs, 4)
    assert blocks == expected
    assert len({id(given) for _, given in blocks}) == 4  # to be changed apart


@pytest.mark.parametrize(
    ('mixer', 'kwargs', 'error', 'message'),
    [
        (('hydra', 'cauchy', 'dft'), None, ValueError, 'a pattern of 3 does not divide depth=4'),
        ((), None, ValueError, r'mixer=\(\): a pattern of 0'),
        ('hydra', [{}] * 3, ValueError, r'mixer_kwargs=\[.*\]: a pattern of 3'),
        *((mixer, None, TypeError, 'it must be a name or a sequence of names') for mixer in (7, ['hydra', 7])),
        ('hydra', 'd_state=4', TypeError, "mixer_kwargs='d_state=4'; it must be a dict"),
        (('hydra', 'caushy'), None, ValueError, "mixer='caushy'"),
        (('hydra', 'vit_attention'), dict(d_state=8), TypeError, "mixer='vit_attention' takes no argument 'd_state'"),
    ],
)
def test_bad_patterns(mixer, kwargs, error, message):
    with pytest.raises(error, match=message):
        mixers.repeat_pattern(mixer, kwargs, 4)
