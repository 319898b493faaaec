"""The Hydra mixer as a module: names and shapes of the released one, initialisation, matrix, precision."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.utils.prune

from hydra_vision import Hydra
from hydra_vision.mixers import hydra


class ReleasedLayout(nn.Module):
    """Parameters of goombalab/hydra's ``Hydra`` by name and shape, written from its published constructor."""

    def __init__(self, d_model, d_state=64, d_conv=7, expand=2, headdim=64, ngroups=1, init_states=False, bias=False):
        super().__init__()
        d_inner = expand * d_model
        heads, conv_dim = d_inner // headdim, d_inner + 4 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, 2 * d_inner + 4 * ngroups * d_state + 2 * heads, bias=bias)
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, d_conv, groups=conv_dim, padding=d_conv // 2)
        if init_states:
            self.init_states = nn.Parameter(torch.zeros(heads, headdim, d_state))
        self.dt_bias = nn.Parameter(torch.rand(heads))
        self.A_log = nn.Parameter(torch.rand(heads))
        self.D = nn.Parameter(torch.rand(heads))
        self.fc_D = nn.Linear(d_inner, heads, bias=False)
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(torch.rand(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias)


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(),
        dict(d_state=16, d_conv=3, headdim=32, ngroups=2, bias=True),
        dict(expand=1, headdim=16),
        dict(init_states=True),
    ],
)
def test_state_dict_moves_both_ways(kwargs):
    theirs = ReleasedLayout(64, **kwargs)
    ours = Hydra(64, **{'learnable_init_states' if k == 'init_states' else k: v for k, v in kwargs.items()})
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    theirs.load_state_dict(Hydra.state_dict(ours), strict=True)


def test_initialisation():
    torch.manual_seed(0)
    mixer = Hydra(512, headdim=16)  # 64 heads
    assert torch.equal(mixer.A_log, torch.zeros(64))
    assert torch.equal(mixer.D, torch.ones(64))
    assert torch.equal(mixer.norm.weight, torch.ones(1024))
    dt = F.softplus(mixer.dt_bias)
    assert dt.min() >= 1e-3 * 0.999
    assert dt.max() <= 0.1 * 1.001
    assert dt.log().std() > 1.0  # spread log-uniformly: (log 100) / sqrt(12) = 1.33
    floored = Hydra(64, dt_min=1e-6, dt_max=2e-6, dt_init_floor=1e-4)
    torch.testing.assert_close(F.softplus(floored.dt_bias), torch.full((2,), 1e-4))


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(),
        dict(share_bc=True),
        dict(ngroups=2),
        dict(bias=True, conv_bias=False, dt_limit=(0.01, 0.1)),
    ],
)
@pytest.mark.parametrize('L', [1, 2, 65, 197])
def test_output_is_the_matrix_applied(L, kwargs):
    torch.manual_seed(0)
    mixer = Hydra(16, d_state=8, headdim=8, **kwargs).double()
    nn.init.normal_(mixer.A_log, std=0.5)
    u = torch.randn(2, L, 16, dtype=torch.float64)
    M = mixer.matrix(u)
    assert M.shape == (2, 4, L, L)

    zxbcdt = mixer.in_proj(u)
    z, x = zxbcdt[..., :32], zxbcdt[..., 32:64]
    bias = None if mixer.conv1d.bias is None else mixer.conv1d.bias[:32]
    x = F.silu(F.conv1d(x.mT, mixer.conv1d.weight[:32], bias, padding=3, groups=32).mT)
    y = torch.einsum('bhij,bjhp->bihp', M, x.unflatten(-1, (4, 8))).flatten(-2)
    y = F.rms_norm(y, (32,), mixer.norm.weight, 1e-5) * F.silu(z)
    torch.testing.assert_close(mixer(u), mixer.out_proj(y), rtol=1e-9, atol=1e-9)


def test_it_looks_both_ways():
    mixer = Hydra(16, d_state=8, headdim=8, d_conv=1).double()
    u = torch.randn(1, 9, 16, dtype=torch.float64)
    changed = u.clone()
    changed[:, 4] += 1
    moved = (mixer(changed) - mixer(u)).abs().amax(-1)[0]
    assert (moved > 1e-9).all()


def test_share_bc_has_fewer_parameters():
    def count(**kwargs):
        return sum(p.numel() for p in Hydra(768, **kwargs).parameters())

    assert count() - count(share_bc=True) == 128 * 768 + 128 * 8


def test_autocast_keeps_decays_and_norm_in_float32():
    """bf16 autocast against float64: the error is that of rounding activations, not that of rounding decays."""
    torch.manual_seed(0)
    mixer = Hydra(64, headdim=16)
    nn.init.constant_(mixer.A_log, -6.0)  # slow decay: 197 steps of a bf16 cumulative sum would be far off
    u = torch.randn(2, 197, 64)
    expected = copy.deepcopy(mixer).double()(u.double())
    with torch.autocast('cpu', torch.bfloat16):
        y = mixer(u)
    assert y.dtype == torch.bfloat16
    assert (y.double() - expected).norm() / expected.norm() < 2e-2


def test_autocast_reaches_the_operator_with_wide_parameters(monkeypatch):
    from hydra_vision.ops import inner

    seen = {}

    def spy(name, x, dt_f, dt_b, A, B_f, C_f, B_b, C_b, D, init_states):
        seen.update(x=x.dtype, dt_f=dt_f.dtype, dt_b=dt_b.dtype, A=A.dtype, D=D.dtype, B_f=B_f.dtype)
        return torch.zeros_like(x)

    monkeypatch.setattr(inner, 'mix_unchecked', spy)
    with torch.autocast('cpu', torch.bfloat16):
        Hydra(64)(torch.randn(1, 5, 64))
    assert seen == dict(
        x=torch.bfloat16, B_f=torch.bfloat16, dt_f=torch.float32, dt_b=torch.float32, A=torch.float32, D=torch.float32
    )


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_dtype_and_device_arguments(dtype):
    mixer = Hydra(64, dtype=dtype, learnable_init_states=True)
    assert {p.dtype for p in mixer.parameters()} == {dtype}
    assert mixer(torch.randn(1, 5, 64, dtype=dtype)).dtype == dtype
    meta = Hydra(64, device='meta', learnable_init_states=True)
    assert {p.device.type for p in meta.parameters()} == {'meta'}
    assert meta(torch.randn(2, 5, 64, device='meta')).shape == (2, 5, 64)


def test_backends_agree_and_a_named_one_is_obeyed(monkeypatch):
    mixer = Hydra(64).double()
    u = torch.randn(2, 65, 64, dtype=torch.float64)
    expected = mixer(u)
    mixer.backend = 'reference'
    torch.testing.assert_close(mixer(u), expected)
    mixer.backend = 'no_such_backend'
    with pytest.raises(ValueError, match='no_such_backend'):
        mixer(u)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(d_conv=4), 'd_conv=4; it must be odd'),
        (dict(ngroups=3), 'ngroups=3 does not divide the number of heads 2'),
        (dict(dt_limit=(0.1,)), 'dt_limit'),
        (dict(backend='nothing'), "unknown backend 'nothing'"),
        (dict(dt_min=0.0), 'dt_min'),
    ],
)
def test_bad_sizes_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Hydra(64, **kwargs)


def test_expand_need_not_be_whole():
    assert Hydra(100, expand=114 / 100, headdim=57).d_inner == 114  # 114 / 100 * 100 is a little less


def test_unknown_argument_is_a_type_error():
    with pytest.raises(TypeError):
        Hydra(64, chunk=3)


def _late_seen(mixer, monkeypatch):
    """What ``forward_late`` asks the operator for; its result is that of the mixer."""
    asked, inner = [], hydra.hydra_inner_late

    def operator(*arguments, late, **kwargs):
        asked.append(late)
        y, _ = inner(*arguments, late=False, **kwargs)
        return (2 * y, torch.full(y.shape[:2], 0.5)) if late else (y, None)

    monkeypatch.setattr(hydra, 'hydra_inner_late', operator)
    u = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    out, factors = mixer.forward_late(u)
    torch.testing.assert_close(out if factors is None else out * factors.unsqueeze(-1), mixer(u))
    return any(asked)


def _subclass(mixer):
    mixer.out_proj = type('Adapted', (nn.Linear,), {})(128, 64, bias=False)


def _parametrised(mixer):
    torch.nn.utils.parametrizations.weight_norm(mixer.out_proj)


@pytest.mark.parametrize(
    'change',
    [
        _subclass,
        _parametrised,
        lambda mixer: torch.nn.utils.prune.l1_unstructured(mixer.out_proj, 'weight', 0.5),
        lambda mixer: mixer.out_proj.register_forward_hook(lambda *args: None),
        lambda mixer: mixer.out_proj.register_forward_pre_hook(lambda *args: None),
        lambda mixer: mixer.out_proj.register_full_backward_hook(lambda *args: None),
        lambda mixer: setattr(mixer.out_proj, 'forward', lambda x: nn.Linear.forward(mixer.out_proj, x)),
        lambda mixer: mixer.out_proj.register_parameter('bias', nn.Parameter(torch.ones(64))),
    ],
)
def test_the_norms_factor_waits_only_for_a_plain_out_proj(change, monkeypatch):
    """Whatever replaces, changes or watches out_proj is given the normalised rows."""
    mixer = Hydra(64, d_state=16)
    assert _late_seen(mixer, monkeypatch) is True
    change(mixer)
    assert _late_seen(mixer, monkeypatch) is False


def test_the_norms_factor_does_not_wait_under_global_hooks(monkeypatch):
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert _late_seen(Hydra(64, d_state=16), monkeypatch) is False
    finally:
        handle.remove()


@pytest.mark.parametrize('strict', [False, True])
def test_exporting_is_told_from_compiling(strict):
    """Only then may the graph of torch.compile leave the norm's factor for after out_proj, as eager mode does."""
    from hydra_vision.mixers.hydra import _is_exporting, _is_plain_product

    class Doubled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.out_proj = torch.nn.Linear(4, 4, bias=False)

        def forward(self, x):
            y = self.out_proj(x)
            return 2 * y if _is_plain_product(self.out_proj) and not _is_exporting() else y

    model, x = Doubled(), torch.randn(2, 4)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, fullgraph=True, backend='eager')(x), 2 * model.out_proj(x))
    assert torch.equal(torch.export.export(model, (x,), strict=strict).module()(x), model.out_proj(x))


def test_traced_by_fx_alone():
    mixer, u = Hydra(64, d_state=16).eval(), torch.randn(2, 9, 64)
    torch.testing.assert_close(torch.fx.symbolic_trace(mixer)(u), mixer(u))
