"""Position parameters resampled to another grid: against timm's position embeddings and against the definition."""

import pytest
import torch
from timm.layers import resample_abs_pos_embed

from hydra_vision import mixers
from hydra_vision.mixers.grid import TokenGrid, resample_offsets

DATA_INDEPENDENT = {
    'dense': ('dense', {}),
    'monarch': ('monarch', {}),
    'toeplitz': ('toeplitz', dict(data_dependent=False)),
    'low_rank': ('low_rank', dict(data_dependent=False)),
    'cauchy': ('cauchy', dict(data_dependent=False)),
    'attention': ('attention', dict(data_dependent=False)),
    'quasiseparable': ('quasiseparable', dict(data_dependent=False, d_state=4)),
}


def make(case: str, grid, **more):
    torch.manual_seed(0)
    name, kwargs = DATA_INDEPENDENT[case]
    return mixers.create(name, 8, headdim=4, grid_size=grid, dtype=torch.float64, **kwargs, **more)


@pytest.mark.parametrize('new', [(4, 4), (3, 7), (9, 2), (1, 1)])
@pytest.mark.parametrize('prefix', [0, 1, 5])
def test_tokens_are_resampled_as_position_embeddings(new, prefix):
    t = torch.randn(prefix + 20, 6)
    got = TokenGrid((4, 5), prefix).tokens(t, TokenGrid(new, prefix))
    expected = resample_abs_pos_embed(t[None], new_size=new, old_size=[4, 5], num_prefix_tokens=prefix)[0]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize('position', ['first', 'middle', 'last'])
def test_prefix_tokens_keep_their_values_and_places(position):
    old, new = TokenGrid((4, 5), 2, position), TokenGrid((2, 3), 2, position)
    t = torch.randn(22, 3)
    start = {'first': (0, 0), 'middle': (10, 3), 'last': (20, 6)}[position]
    got = old.tokens(t, new)
    assert torch.equal(got[start[1] : start[1] + 2], t[start[0] : start[0] + 2])
    patches = [torch.cat([x[:at], x[at + 2 :]]) for x, at in ((t, start[0]), (got, start[1]))]
    torch.testing.assert_close(patches[1], TokenGrid((4, 5)).tokens(patches[0], TokenGrid((2, 3))))


@pytest.mark.parametrize(('old', 'new'), [((3, 4), (5, 6)), ((4, 4), (3, 7)), ((1, 9), (1, 12)), ((5, 2), (2, 5))])
def test_toeplitz_coefficients_over_the_grid(old, new):
    """The new matrix is the Toeplitz matrix nearest to the resampled kernel over (dy, dx)."""
    H, W = new
    t = torch.randn(2 * old[0] * old[1] - 1, dtype=torch.float64)
    dy, dx = torch.arange(1 - old[0], old[0])[:, None], torch.arange(1 - old[1], old[1])[None, :]
    kernel = t[dy * old[1] + dx + old[0] * old[1] - 1]
    kernel = torch.nn.functional.interpolate(
        kernel[None, None], size=(2 * H - 1, 2 * W - 1), mode='bicubic', antialias=True
    )[0, 0]
    i = torch.arange(H * W)
    M = kernel[(i[:, None] // W - i // W) + H - 1, (i[:, None] % W - i % W) + W - 1]
    means = torch.stack([torch.diagonal(M, -k).mean() for k in range(1 - H * W, H * W)])
    torch.testing.assert_close(resample_offsets(t, old, new), means)
    assert resample_offsets(t, old, old) is t


@pytest.mark.parametrize('case', DATA_INDEPENDENT)
def test_another_grid_in_passing_and_for_good(case):
    mixer = make(case, (4, 5))
    before = mixer(torch.randn(2, 20, 8, dtype=torch.float64))
    u = torch.randn(2, 18, 8, dtype=torch.float64)
    y, M = mixer(u, (6, 3)), mixer.matrix(u, (6, 3))
    y.sum().backward()  # a resampled parameter still learns
    assert all(p.grad is not None for p in mixer.parameters())
    mixer.requires_grad_(False)
    mixer.set_input_size((6, 3))
    assert not any(p.requires_grad for p in mixer.parameters())
    torch.testing.assert_close(mixer(u), y)
    torch.testing.assert_close(mixer.matrix(u), M)
    mixer.set_input_size((4, 5))
    assert mixer(torch.randn(2, 20, 8, dtype=torch.float64)).shape == before.shape


@pytest.mark.parametrize('case', ['dense', 'monarch', 'toeplitz', 'low_rank', 'cauchy'])
def test_a_sum_over_more_tokens_is_not_larger(case):
    """A kernel that is constant over the image weighs the same at any resolution."""
    mixer = make(case, (4, 5))
    with torch.no_grad():
        for name in mixer.grid_parameters():
            getattr(mixer, name).fill_(0.7)
    sums = [mixer.matrix(torch.zeros(1, h * w, 8, dtype=torch.float64), (h, w)).sum(-1) for h, w in ((4, 5), (8, 10))]
    torch.testing.assert_close(sums[1], sums[0][..., :1].expand_as(sums[1]))


def test_more_tokens_write_less_each():
    """Of a state space model with parameters for B and C: C reads a state as before, the sum over B stays the same."""
    mixer = mixers.create('quasiseparable', 8, d_state=2, headdim=4, data_dependent=False, grid_size=(4, 5))
    with torch.no_grad():
        mixer.BC.fill_(1.0)
    B_f, C_f, B_b, C_b = mixer.resampled_parameters((8, 10))['BC'].unflatten(-1, (4, 2)).unbind(-2)
    for C in (C_f, C_b):
        torch.testing.assert_close(C, torch.ones(80, 2))
    for B in (B_f, B_b):
        torch.testing.assert_close(B.sum(0), torch.full((2,), 20.0))


@pytest.mark.parametrize('case', DATA_INDEPENDENT)
def test_grid_of_a_checkpoint_from_its_shape(case):
    mixer = make(case, (4, 4))
    for name in mixer.grid_parameters():
        assert mixer.old_tokens(name, getattr(make(case, (7, 7)), name)).size == (7, 7)
    if case == 'monarch':
        assert mixer.old_tokens('rows', make(case, (2, 3)).rows).size == (2, 3)
    else:
        name = mixer.grid_parameters()[0]
        assert mixer.old_tokens(name, getattr(make(case, (2, 3)), name)) is None
        sequence = make(case, 4)
        assert sequence.old_tokens(name, getattr(make(case, 7), name)).size == (1, 7)


def test_what_cannot_be_resampled_is_rejected():
    mixer = mixers.create('vandermonde', 8, headdim=4, data_dependent=False, grid_size=(4, 4))
    with pytest.raises(ValueError, match='Vandermonde: parameters for 4 x 4 patches cannot be resampled to 5 x 5'):
        mixer(torch.randn(1, 25, 8), (5, 5))
    mixer = make('toeplitz', (4, 4), num_prefix_tokens=1)
    assert mixer(torch.randn(1, 17, 8, dtype=torch.float64)).shape == (1, 17, 8)
    with pytest.raises(ValueError, match='offset to a class token'):
        mixer.set_input_size((5, 5))


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(size=(0, 4)), r'grid_size=\(0, 4\)'),
        (dict(size=(2, 3, 4)), 'it must be .H, W. or a number'),
        (dict(size=0), 'grid_size=0'),
        (dict(size=4, num_prefix_tokens=-1), 'num_prefix_tokens=-1'),
        (dict(size=4, prefix_position='front'), "prefix_position='front'; allowed: 'first'"),
    ],
)
def test_bad_grids(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TokenGrid(**kwargs)
