"""hydra_inner: the composition between the projections, its dtypes and its errors."""

import pytest
import torch
import torch.nn.functional as F

from hydra_vision.ops import hydra_inner
from hydra_vision.ops.inner import split_zxbcdt, unpack_convolved

H, P, N = 4, 8, 6


def make_inner_inputs(B=2, L=17, G=1, share_bc=False, d_conv=7, init_states=False, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    conv_dim = H * P + (2 if share_bc else 4) * G * N
    tensors = dict(
        zxbcdt=randn(B, L, H * P + conv_dim + 2 * H),
        conv_weight=randn(conv_dim, 1, d_conv) / d_conv**0.5,
        conv_bias=randn(conv_dim),
        dt_bias=randn(H),
        A_log=0.1 * randn(H),
        D=randn(H),
        fc_D_weight=randn(H, H * P) / (H * P) ** 0.5,
        norm_weight=1 + 0.1 * randn(H * P),
    )
    options = dict(headdim=P, d_state=N, ngroups=G, share_bc=share_bc)
    if init_states:
        tensors['init_states'] = randn(H, P, N)
    return tensors, options


def by_hand(
    zxbcdt,
    conv_weight,
    conv_bias,
    dt_bias,
    A_log,
    D,
    fc_D_weight,
    norm_weight,
    init_states=None,
    *,
    headdim,
    d_state,
    ngroups,
    share_bc,
    dt_limit=(0.0, float('inf')),
):
    """The released module's forward between its projections, step by step: flips, a roll, a token-wise recurrence."""
    B, L, _ = zxbcdt.shape
    d_inner, width = H * headdim, ngroups * d_state
    z, xBC, dt = zxbcdt.split([d_inner, conv_weight.shape[0], 2 * H], -1)
    xBC = F.conv1d(xBC.mT, conv_weight, conv_bias, padding=conv_weight.shape[-1] // 2, groups=conv_weight.shape[0]).mT
    xBC = F.silu(xBC)
    dt = F.softplus(dt + torch.cat([dt_bias, dt_bias])).clamp(*dt_limit)
    x, BC = xBC[..., :d_inner], xBC[..., d_inner:]
    parts = BC.split(width, -1)
    B_f, C_f, B_b, C_b = parts * 2 if share_bc else parts

    def causal(x, dt, Bt, Ct):
        y, h = torch.zeros_like(x), torch.zeros(B, H, headdim, d_state, dtype=x.dtype)
        if init_states is not None:
            h = h + init_states
        for t in range(L):
            Bh, Ch = (m[:, t].unflatten(-1, (ngroups, d_state)).repeat_interleave(H // ngroups, 1) for m in (Bt, Ct))
            h = h * torch.exp(-A_log.exp() * dt[:, t])[..., None, None]
            h = h + (dt[:, t, :, None] * x[:, t])[..., None] * Bh[:, :, None]
            y[:, t] = (h * Ch[:, :, None]).sum(-1)
        y = torch.roll(y, 1, 1)
        y[:, 0] = 0
        return y

    xh = x.unflatten(-1, (H, headdim))
    y = causal(xh, dt[..., :H], B_f, C_f)
    y = y + causal(xh.flip(1), dt[..., H:].flip(1), B_b.flip(1), C_b.flip(1)).flip(1)
    y = y + xh * (F.linear(x, fc_D_weight) + D)[..., None]
    y = y.flatten(-2)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm_weight
    return y * F.silu(z)


@pytest.mark.parametrize('backend', ['reference', 'chunked'])
@pytest.mark.parametrize(('G', 'share_bc', 'init_states'), [(1, False, False), (2, False, True), (2, True, False)])
@pytest.mark.parametrize('L', [1, 2, 17, 65])
def test_equals_the_released_algorithm(L, G, share_bc, init_states, backend):
    tensors, options = make_inner_inputs(L=L, G=G, share_bc=share_bc, init_states=init_states)
    actual = hydra_inner(**tensors, **options, backend=backend)
    torch.testing.assert_close(actual, by_hand(**tensors, **options), rtol=1e-9, atol=1e-9)


def test_dt_limit():
    tensors, options = make_inner_inputs()
    limited = hydra_inner(**tensors, **options, dt_limit=(0.5, 0.6))
    torch.testing.assert_close(limited, by_hand(**tensors, **options, dt_limit=(0.5, 0.6)), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(limited, hydra_inner(**tensors, **options))


@pytest.mark.parametrize('backend', ['reference', 'chunked'])
def test_gradcheck(backend):
    tensors, options = make_inner_inputs(B=1, L=4, init_states=True)
    names = list(tensors)
    inputs = tuple(t.requires_grad_() for t in tensors.values())

    def function(*values):
        return hydra_inner(**dict(zip(names, values)), **options, backend=backend)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_softplus_is_stable_far_below_zero():
    tensors, options = make_inner_inputs()
    tensors['dt_bias'] = torch.full((H,), -40.0, dtype=torch.float64)
    _, xbc, dt = split_zxbcdt(tensors['zxbcdt'].float(), H * options['headdim'], H)
    _, dt_f, dt_b, *_ = unpack_convolved(xbc, dt, tensors['dt_bias'].float(), **options, dt_limit=(0.0, float('inf')))
    assert (dt_f > 0).all()
    assert (dt_b > 0).all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_keeps_decays_and_norm_in_float32(dtype):
    tensors, options = make_inner_inputs(L=197)
    low = {k: v.to(dtype) for k, v in tensors.items()}
    expected = by_hand(**{k: v.double() for k, v in low.items()}, **options)
    # as under autocast: activations narrow, parameters wide
    mixed = {k: v.to(dtype) if k == 'zxbcdt' else low[k].float() for k, v in tensors.items()}
    for arguments in (low, mixed):
        y = hydra_inner(**arguments, **options)
        assert y.dtype == dtype
        error = (y.double() - expected).norm() / expected.norm()
        assert error < (1e-2 if dtype == torch.bfloat16 else 2e-3)


def test_norm_statistics_do_not_overflow_float16():
    tensors, options = make_inner_inputs(dtype=torch.float16)
    tensors['D'] = torch.full((H,), 3000.0, dtype=torch.float16)  # y ~ 3e3, y^2 ~ 1e7 > 65504
    y = hydra_inner(**tensors, **options)
    assert torch.isfinite(y).all()
    assert y.abs().max() > 0.1


@pytest.mark.parametrize(
    ('name', 'change'),
    [
        *(('zxbcdt', change) for change in (lambda t: t[..., :-1], lambda t: t[0], lambda t: t[:, :0])),
        ('conv_weight', lambda t: t[..., :-1]),
        ('dt_bias', lambda t: t[0]),
        ('fc_D_weight', lambda t: t.T),
        *((name, lambda t: t[:-1]) for name in ('conv_weight', 'conv_bias', 'A_log', 'D', 'norm_weight')),
        *((name, lambda t: t.to('meta')) for name in ('conv_weight', 'conv_bias', 'dt_bias', 'fc_D_weight')),
    ],
)
def test_bad_tensors_are_named(name, change):
    tensors, options = make_inner_inputs()
    tensors[name] = change(tensors[name])
    with pytest.raises(ValueError, match=f'^{name} (has|is on)'):
        hydra_inner(**tensors, **options)


@pytest.mark.parametrize(
    'options',
    [dict(ngroups=3), dict(dt_limit=(1.0, 0.5)), dict(dt_limit=(-1.0, 0.5)), dict(backend='nothing')],
)
def test_bad_options_are_named(options):
    tensors, defaults = make_inner_inputs()
    with pytest.raises(ValueError, match=next(iter(options))):
        hydra_inner(**tensors, **{**defaults, **options})


def test_integer_input_is_refused():
    tensors, options = make_inner_inputs()
    tensors['zxbcdt'] = tensors['zxbcdt'].long()
    with pytest.raises(TypeError, match='zxbcdt has dtype'):
        hydra_inner(**tensors, **options)


@pytest.mark.parametrize('gradients', [False, True])
@pytest.mark.parametrize('backend', ['chunked', 'reference'])
@pytest.mark.parametrize('L', [17, 70])
def test_vmap_over_one_tensor_alone(L, backend, gradients):
    tensors, options = make_inner_inputs(B=1, L=L, init_states=True)
    if gradients:
        tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    for name in tensors:
        several = torch.stack([tensors[name], 1.1 * tensors[name]])
        others = {other: t for other, t in tensors.items() if other != name}

        def one(t):
            return hydra_inner(**{name: t}, **others, **options, backend=backend)  # noqa: B023

        with torch.set_grad_enabled(gradients):
            found = torch.func.vmap(one)(several)
            torch.testing.assert_close(found, torch.stack([one(t) for t in several]), msg=lambda m: f'{name}: {m}')  # noqa: B023
