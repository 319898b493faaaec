"""Every mixer of the family against its definition: output, gradient, matrix, structure, length."""

import copy
import math

import pytest
import torch
from matrix_definitions import SS_VARIANTS, cases, make, matrix, output

from hydra_vision import Hydra, mixers
from hydra_vision.mixers.monarch import ImplicitFilter

CASES = cases()
all_cases = pytest.mark.parametrize('case', CASES)


def tokens(L: int, B: int = 2, d_model: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, L, d_model, dtype=torch.float64, generator=generator)


def test_no_mixer_is_forgotten():
    covered = {name for name, _ in CASES.values()}
    assert set(mixers.list_mixers()) - covered == {'hydra', 'quasiseparable', 'vit_attention'}  # below


@all_cases
@pytest.mark.parametrize('grid', [(3, 4), (5, 1), (1, 1), (1, 2)])
def test_output_and_gradient_are_those_of_the_dense_matrix(case, grid):
    name, kwargs = CASES[case]
    mixer = make(name, kwargs, grid)
    gradients = []
    for compute in (mixer, lambda u: output(mixer, name, u)):
        u = tokens(grid[0] * grid[1]).requires_grad_()
        mixer.zero_grad()
        y = compute(u)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        named = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in mixer.named_parameters()}
        gradients.append({'y': y.detach(), 'u': u.grad, **named})
    for n, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][n], expected, rtol=1e-7, atol=1e-9, msg=lambda m, n=n: f'{n}: {m}')


@all_cases
def test_matrix_is_the_definition(case):
    name, kwargs = CASES[case]
    mixer = make(name, kwargs, (3, 4))
    M, expected = mixer.matrix(tokens(12)), matrix(mixer, name, tokens(12))
    assert M.shape == (2, *expected.shape[1:])
    torch.testing.assert_close(M, expected.expand_as(M), rtol=1e-9, atol=1e-11)


@all_cases
def test_length(case):
    """Data-dependent matrices take any L, data-independent ones their own (grids: test_grid.py)."""
    name, kwargs = CASES[case]
    mixer = make(name, kwargs, (3, 4))
    if not mixer.takes_grid:
        for L in (1, 13, 49, 65):
            assert torch.isfinite(mixer(tokens(L))).all()
        torch.testing.assert_close(mixer(tokens(17)), output(mixer, name, tokens(17)), rtol=1e-7, atol=1e-9)
        if name in ('toeplitz', 'checkpoint'):
            with pytest.raises(ValueError, match=r'grid=\(3, 4\)'):
                mixer(tokens(12), (3, 4))
        return
    with pytest.raises(ValueError, match='L=13 tokens; 3 x 4 patches are 12'):
        mixer(tokens(13))
    with pytest.raises(ValueError, match='L=13 tokens; 3 x 5 patches are 15'):
        mixer(tokens(13), (3, 5))


def test_initial_values():
    """As in the paper's code: xavier over the whole tensor, c = 0.5, A = -1, D = 1, dt log-uniform in [1e-3, 0.1]."""
    torch.manual_seed(0)

    def made(name, **kwargs):
        return mixers.create(name, 64, headdim=16, grid_size=(8, 8), **kwargs)  # 8 heads, L = 64

    def xavier(fan_in, fan_out):
        return (2 / (fan_in + fan_out)) ** 0.5

    M = made('dense').M
    assert M.std().item() == pytest.approx(xavier(64 * 64, 8 * 64), rel=0.05)
    t = made('toeplitz', data_dependent=False).t
    assert t.std().item() == pytest.approx(xavier(127, 8), rel=0.05)
    assert t.abs().max().item() == pytest.approx(3**0.5 * xavier(127, 8), rel=0.05)  # uniform
    for name in ('low_rank', 'cauchy', 'attention'):
        mixer = made(name, data_dependent=False, qk_dim=16)
        for p in (mixer.q, mixer.k):
            assert p.std().item() == pytest.approx(xavier(8 * 16, 64 * 16), rel=0.05)
    assert mixers.create('cauchy', 64).c.tolist() == [0.5]
    for mixer in (mixers.create('semiseparable', 64), made('quasiseparable', data_dependent=False)):
        assert not mixer.A_log.any()
        dt = torch.nn.functional.softplus(mixer.dt_bias)
        assert dt.min() > 0.99e-3
        assert dt.max() < 0.101
    assert (mixer.D == 1).all()


def test_initial_values_of_our_own():
    """Where the paper's code has none that works, or none at all."""
    torch.manual_seed(0)

    def made(name, **kwargs):
        return mixers.create(name, 64, headdim=16, grid_size=(8, 16), **kwargs)  # 8 heads, L = 128

    vandermonde = made('vandermonde', data_dependent=False)
    assert vandermonde.q.std().item() == pytest.approx(1, rel=0.05)
    assert vandermonde.k.std().item() == pytest.approx(1, rel=0.05)
    monarch = made('monarch')  # each factor keeps the variance of its input
    assert monarch.rows.std().item() == pytest.approx(16**-0.5, rel=0.05)
    assert monarch.columns.std().item() == pytest.approx(8**-0.5, rel=0.05)
    BC = made('quasiseparable', data_dependent=False).BC  # (L, 4 N)
    assert BC.std().item() == pytest.approx((2 / (128 + 4 * 64)) ** 0.5, rel=0.05)


def test_cauchy_denominator_stays_positive():
    """A learned c below zero counts as zero."""
    mixer = make('cauchy', dict(qk_dim=3))
    with torch.no_grad():
        mixer.c.fill_(-3.0)
    M = mixer.matrix(tokens(12))
    assert (M > 0).all()
    with torch.no_grad():
        mixer.c.zero_()
    torch.testing.assert_close(mixer.matrix(tokens(12)), M)


@pytest.mark.parametrize('L', [1, 2, 7, 64])
def test_filter_of_the_long_convolution(L):
    """Entry by entry from its definition: position features, sine MLP, window; offset -1 reads row 0 of its own MLP."""
    channels, bands = 5, 3
    f = ImplicitFilter(channels, hidden=4, bands=bands, dtype=torch.float64)
    assert f.frequency.tolist() == [10.0] * 4
    with torch.no_grad():
        f.frequency.add_(torch.randn(4))

    def coefficient(direction, step, channel):
        t = step / L
        turns = [2 * math.pi * t * n for n in range(1, bands + 1)]
        h = torch.tensor([t, *map(math.cos, turns), *map(math.sin, turns)], dtype=torch.float64)
        for n in (1, 2, 3):
            weight, bias = getattr(f, f'weight{n}')[direction], getattr(f, f'bias{n}')[direction, 0]
            h = (f.frequency * (weight.T @ h + bias)).sin()
        reach = 1 / (1 / 1.5 + (1 / 0.3 - 1 / 1.5) * channel / (channels - 1))  # of L: where 1 % is left
        return (f.weight_out[direction].T @ h)[channel] * 0.01 ** (t / reach)

    found = f(L)
    assert found.shape == (channels, 2 * L - 1)
    for offset in {0, 1, 3, L - 1, -1, -3, 1 - L} & set(range(1 - L, L)):
        direction, step = (0, offset) if offset >= 0 else (1, -offset - 1)
        for channel in range(channels):
            expected = coefficient(direction, step, channel)
            torch.testing.assert_close(found[channel, L - 1 + offset], expected, rtol=1e-10, atol=1e-12)


def block_ranks(M: torch.Tensor, rows: slice, columns: slice) -> int:
    return int(torch.linalg.matrix_rank(M[..., rows, columns], rtol=1e-9).max())


@pytest.mark.parametrize('dd', [True, False])
def test_semiseparable_structure(dd):
    N, L = 2, 12
    for variant in SS_VARIANTS:
        mixer = make('semiseparable', dict(variant=variant, d_state=N, data_dependent=dd), (3, 4))
        M = mixer.matrix(tokens(L)).detach()
        lower, upper = M, M
        if variant in ('mult', 'concat'):
            lower, upper = M.chunk(2, dim=1)
        if variant in ('mult', 'concat', 'causal'):
            assert not torch.triu(lower, 1).any()
        if variant in ('mult', 'concat'):
            assert not torch.tril(upper, -1).any()
        for m in range(1, L):
            # strictly below and above the diagonal; the semiseparable matrix's blocks may touch it
            assert block_ranks(lower, slice(m, L), slice(0, m)) <= N
            if variant != 'causal':
                assert block_ranks(upper, slice(0, m), slice(m, L)) <= N
            if variant in ('causal', 'mult', 'concat'):
                assert block_ranks(lower, slice(m, L), slice(0, m + 1)) <= N
        assert block_ranks(lower, slice(6, L), slice(0, 6)) == N
        diagonal = torch.diagonal(M, dim1=-2, dim2=-1)
        if variant == 'add_shift':
            assert not diagonal.any()
        if variant == 'quasiseparable':  # free: whatever the off-diagonal entries, it is fc_D(v) + D
            moved = make('semiseparable', dict(variant=variant, d_state=N, data_dependent=dd), (3, 4))
            with torch.no_grad():
                moved.D.add_(1.0)
            shift = moved.matrix(tokens(L)) - M
            torch.testing.assert_close(shift, torch.eye(L, dtype=M.dtype).expand_as(M))


@pytest.mark.parametrize('dd', [True, False])
def test_toeplitz_low_rank_cauchy_structure(dd):
    M = make('toeplitz', dict(data_dependent=dd), (3, 4)).matrix(tokens(12))
    assert torch.equal(M[..., 1:, 1:], M[..., :-1, :-1])
    M = make('low_rank', dict(data_dependent=dd, qk_dim=3), (3, 4)).matrix(tokens(12)).detach()
    assert block_ranks(M, slice(None), slice(None)) == 3
    # with d = 1 a Cauchy matrix: displacement D_q M + M D_k has rank one
    mixer = make('cauchy', dict(data_dependent=dd, qk_dim=1), (3, 4))
    M = 1 / mixer.matrix(tokens(12)).detach()  # a sum of a row's and a column's term
    assert block_ranks(M, slice(None), slice(None)) == 2
    M = make('attention', dict(data_dependent=dd, qk_dim=3), (3, 4)).matrix(tokens(12))
    torch.testing.assert_close(M.sum(-1), torch.ones_like(M[..., 0]))


def test_fourier_structure():
    M = make('dft', {}).matrix(tokens(12)).detach()
    assert block_ranks(M, slice(None), slice(None)) == 7  # L // 2 + 1: the cosine alone
    M = make('dft', dict(kernel='hartley')).matrix(tokens(12))
    torch.testing.assert_close(M @ M.mT, torch.eye(12, dtype=M.dtype).expand_as(M))
    with pytest.raises(ValueError, match="kernel='sine'; allowed"):
        mixers.create('dft', 64, kernel='sine')


def test_monarch_structure():
    """M = P^T C P R with block-diagonal R and C, at the grid that a 224 px image has."""
    mixer = make('monarch', {}, (14, 14))
    M = mixer.matrix(tokens(196, B=1))[0].detach()
    order = torch.arange(196).view(14, 14).T.flatten()
    P = torch.eye(196, dtype=M.dtype)[order]
    for h in range(4):
        R, C = (torch.block_diag(*factor[h].detach()) for factor in (mixer.rows, mixer.columns))
        torch.testing.assert_close(M[h], P.T @ C @ P @ R)
    # the block that takes row c of the grid to column b has rank one
    blocks = M.view(4, 14, 14, 14, 14).permute(0, 2, 3, 1, 4)
    assert block_ranks(blocks, slice(None), slice(None)) == 1
    with pytest.raises(ValueError, match='num_prefix_tokens=1'):
        mixers.create('monarch', 64, grid_size=(4, 4), num_prefix_tokens=1)


@pytest.mark.parametrize('share_bc', [False, True])
def test_quasiseparable_is_hydra(share_bc):
    hydra = Hydra(16, d_state=8, headdim=8, share_bc=share_bc).double()
    u = tokens(33, d_model=16)
    for mixer in (
        mixers.create('quasiseparable', 16, d_state=8, headdim=8, share_bc=share_bc, dtype=torch.float64),
        mixers.create('semiseparable', 16, variant='quasiseparable', d_state=8, headdim=8, share_bc=share_bc).double(),
    ):
        mixer.load_state_dict(hydra.state_dict(), strict=True)
        torch.testing.assert_close(mixer(u), hydra(u), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(mixer.matrix(u), hydra.matrix(u), rtol=1e-9, atol=1e-11)
    assert 'variant' not in mixers.arguments('quasiseparable')


@pytest.mark.parametrize('name', mixers.list_mixers())
def test_matrix_under_autocast_is_wide(name):
    mixer = mixers.create(name, 64, **(dict(grid_size=13) if mixers.needs_grid(name) else {}))
    u = tokens(13, d_model=64).float()
    expected = mixer.matrix(u)
    with torch.autocast('cpu', torch.bfloat16):
        M = mixer.matrix(u)
    assert M.dtype == torch.float32
    assert (M - expected).norm() < 0.03 * expected.norm()


def test_vit_attention():
    mixer = mixers.create('vit_attention', 16, headdim=8, dtype=torch.float64)
    u = tokens(13, d_model=16)
    v = torch.nn.functional.linear(u, mixer.qkv.weight, mixer.qkv.bias)[..., 32:].unflatten(-1, (2, 8))
    y = torch.einsum('bhij,bjhp->bihp', mixer.matrix(u), v).flatten(-2)
    torch.testing.assert_close(mixer(u), mixer.proj(y))
    with pytest.raises(ValueError, match='headdim=5 does not divide d_model=16'):
        mixers.create('vit_attention', 16, headdim=5)
    assert mixers.create('vit_attention', 16, num_heads=3, headdim=8).qkv.weight.shape == (72, 16)


@all_cases
def test_half_precision_is_that_of_rounding_the_tokens(case):
    """bfloat16 through FFT, exponentials, cosines and decays: all of them in float32."""
    name, kwargs = CASES[case]
    mixer = make(name, kwargs, (8, 8), d_model=32)
    u = tokens(64, d_model=32)
    expected = mixer(u)
    narrow = mixer.float()
    with torch.autocast('cpu', torch.bfloat16):
        y = narrow(u.float())
    assert y.dtype == torch.bfloat16
    assert (y.double() - expected).norm() < 0.03 * expected.norm()
    y = narrow.bfloat16()(u.bfloat16())
    assert y.dtype == torch.bfloat16
    expected = narrow.double()(u.bfloat16().double())  # of the rounded parameters
    assert (y.double() - expected).norm() < 0.03 * expected.norm()


@pytest.fixture
def largest(largest_numel):
    """Forward and backward of a mixer over L tokens."""
    return lambda mixer, L: largest_numel(lambda: mixer(torch.randn(1, L, 16)).sum().backward())


@pytest.mark.parametrize(
    ('name', 'kwargs'),
    [
        ('low_rank', {}),
        ('low_rank', dict(data_dependent=False)),
        ('toeplitz', {}),
        ('toeplitz', dict(data_dependent=False)),
        ('m2', {}),
        ('dft', {}),
        ('monarch', {}),
        ('semiseparable', dict(d_state=8, variant='add')),
        ('semiseparable', dict(d_state=8, variant='quasiseparable', data_dependent=False)),
    ],
)
def test_structured_mixers_never_form_the_matrix(name, kwargs, largest):
    """Forward and backward: the largest tensor grows like L (for monarch, like its own parameters), not like L^2."""
    sizes = {}
    for side in (16, 32):
        grid = dict(grid_size=(side, side)) if mixers.needs_grid(name, **kwargs) else {}
        heads = {} if name == 'm2' else dict(headdim=16)
        sizes[side] = largest(mixers.create(name, 16, expand=1, **heads, **kwargs, **grid), side * side)
    assert sizes[32] <= sizes[16] * (8 if name == 'monarch' else 4.1)
    assert sizes[32] <= 1024 * 1024 / 4


@pytest.mark.parametrize('name', ['cauchy', 'vandermonde'])
@pytest.mark.parametrize('dd', [True, False])
def test_the_sum_over_d_is_never_materialised(name, dd, largest):
    """Forward and backward: the largest tensor is one (B, H, L, L), whatever d."""
    L, grid = 128, {} if dd else dict(grid_size=128)
    mixer = mixers.create(name, 16, qk_dim=32, headdim=16, expand=1, data_dependent=dd, **grid)
    assert largest(mixer, L) == L * L


@pytest.mark.gpu
@all_cases
@pytest.mark.parametrize('grid', [(5, 13), (14, 14)])
def test_on_the_gpu(case, grid):
    """Forward and backward with the default backend there, against float64 on the CPU; also under bf16 autocast."""
    name, kwargs = CASES[case]
    if 'd_state' in kwargs:  # the kernels have no other
        kwargs = dict(kwargs, d_state=16)
    elif 'd_state' in kwargs.get('linear_kwargs', {}):
        kwargs = dict(kwargs, linear_kwargs=dict(kwargs['linear_kwargs'], d_state=16))
    mixer = make(name, kwargs, grid, d_model=64)
    u = tokens(grid[0] * grid[1], d_model=64)
    expected = mixer(u)
    expected.square().mean().backward()
    gradients = {n: p.grad for n, p in mixer.named_parameters() if p.grad is not None}
    device = copy.deepcopy(mixer).float().cuda()
    device.zero_grad()
    y = device(u.float().cuda())
    y.square().mean().backward()
    assert (y.cpu() - expected).norm() < 2e-3 * expected.norm()
    for n, p in device.named_parameters():
        if n in gradients:
            assert (p.grad.cpu() - gradients[n]).norm() < 1e-2 * gradients[n].norm() + 1e-6, n
    with torch.autocast('cuda', torch.bfloat16):
        y = device(u.float().cuda())
    assert (y.cpu() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.gpu
def test_head_widths_without_a_kernel_are_filled_up():
    mixer = mixers.create('semiseparable', 64, variant='add', headdim=20, expand=1.25, d_state=12).cuda()
    u = torch.randn(2, 65, 64, device='cuda')
    y = mixer(u)
    mixer.backend = 'chunked'
    torch.testing.assert_close(y, mixer(u), rtol=1e-2, atol=1e-3)
