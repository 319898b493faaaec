"""The operator: three independent computations against each other, gradients, odd sizes, extremes, bad input."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hydra_vision.ops import chunked, exported, quasiseparable_matrix, quasiseparable_mix
from hydra_vision.ops.chunked import mix_chunked
from hydra_vision.ops.exported import mix_exported
from hydra_vision.ops.reference import mix_dense, mix_recurrence

LENGTHS = (1, 2, 3, 7, 49, 63, 64, 65, 196, 197, 576)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def definition(x, dt_f, dt_b, A, B_f, C_f, B_b, C_b, D, init_states=None):
    """y from the formula, entry by entry, in Python floats: independent of every function of the package."""
    B, L, H, P = x.shape
    G = B_f.shape[2]
    y = torch.zeros_like(x)
    for b in range(B):
        for h in range(H):
            g = h * G // H
            for i in range(L):
                for j in range(L):
                    if i > j:
                        decay = sum(A[h] * dt_f[b, k, h] for k in range(j + 1, i))
                        m = (C_f[b, i - 1, g] @ B_f[b, j, g]) * torch.as_tensor(decay).exp() * dt_f[b, j, h]
                    elif i < j:
                        decay = sum(A[h] * dt_b[b, k, h] for k in range(i + 1, j))
                        m = (C_b[b, i + 1, g] @ B_b[b, j, g]) * torch.as_tensor(decay).exp() * dt_b[b, j, h]
                    else:
                        m = D[b, i, h]
                    y[b, i, h] += m * x[b, j, h]
                if init_states is not None and i >= 1:
                    decay = sum(A[h] * dt_f[b, k, h] for k in range(i))
                    y[b, i, h] += init_states[h] @ C_f[b, i - 1, g] * torch.as_tensor(decay).exp()
                if init_states is not None and i <= L - 2:
                    decay = sum(A[h] * dt_b[b, k, h] for k in range(i + 1, L))
                    y[b, i, h] += init_states[h] @ C_b[b, i + 1, g] * torch.as_tensor(decay).exp()
    return y


@pytest.mark.parametrize('init_states', [False, True])
@pytest.mark.parametrize('G', [1, 2])
@pytest.mark.parametrize('L', [1, 2, 3, 6])
def test_all_forms_equal_the_definition(mix_inputs, L, G, init_states):
    inputs = mix_inputs(L=L, G=G, init_states=init_states)
    expected = definition(**inputs)
    for form in (mix_dense, mix_recurrence, mix_chunked, mix_exported):
        assert relative(form(**inputs), expected) < 1e-13
    assert relative(mix_chunked(**inputs, chunk_size=4, tile_size=1), expected) < 1e-13


@pytest.mark.parametrize(
    ('L', 'A', 'dt'),
    [
        *((L, 'usual', 'usual') for L in LENGTHS),
        *((L, A, dt) for L in (7, 197) for A in ('weak', 'strong') for dt in ('zero', 'large', 'mixed')),
    ],
)
def test_forms_agree_in_float64_and_float32(mix_inputs, L, A, dt):
    inputs = mix_inputs(L=L, G=2, dt=dt, A=A, init_states=True)
    expected = mix_recurrence(**inputs)
    assert relative(mix_dense(**inputs), expected) < 1e-10
    assert relative(mix_chunked(**inputs), expected) < 1e-10
    assert relative(mix_exported(**inputs), expected) < 1e-10
    for chunk_size, tile_size in ((64, 64), (48, 7), (L, 16)):  # divides L or not, one chunk or many
        assert relative(mix_chunked(**inputs, chunk_size=chunk_size, tile_size=tile_size), expected) < 1e-10

    single = inputs.to(torch.float32)
    expected = mix_recurrence(**single.to(torch.float64))  # of the rounded inputs
    for form in (mix_dense, mix_recurrence, mix_chunked, mix_exported):
        assert relative(form(**single), expected) < 1e-5
    assert relative(mix_chunked(**single, chunk_size=48, tile_size=7), expected) < 1e-5


@pytest.mark.parametrize('D', ['token', 'head', 'none'])
@pytest.mark.parametrize('dt', ['usual', 'zero', 'large', 'mixed'])
def test_exported_form_in_chunks(mix_inputs, monkeypatch, dt, D):
    monkeypatch.setattr(exported, '_DENSE', 1)
    monkeypatch.setattr(exported, '_CHUNK', 5)
    for L, G, init_states in ((2, 1, False), (10, 1, True), (23, 2, False), (24, 2, True)):
        inputs = mix_inputs(L=L, G=G, D=D, dt=dt, init_states=init_states).requires_grad_()
        names = [name for name, t in inputs.items() if t is not None]
        results = []
        for form in (mix_exported, mix_recurrence):
            y = form(**inputs)
            results.append((y, *torch.autograd.grad(y.sin().sum(), [inputs[name] for name in names])))
        for name, actual, expected in zip(['y', *names], *results):
            if name == 'y' or dt == 'usual':  # not of dt = 0, nor where what is left of a decay is rounding
                assert relative(actual, expected) < 1e-10, (name, L)


def test_many_chunks_scan_in_groups(mix_inputs):
    """More than 32 and more than 32^2 chunks: the scan over chunks calls itself."""
    inputs = mix_inputs(B=1, L=2100, H=2, P=2, N=2, init_states=True)
    expected = mix_recurrence(**inputs)
    assert relative(mix_chunked(**inputs, chunk_size=2), expected) < 1e-10
    assert relative(mix_chunked(**inputs, chunk_size=50), expected) < 1e-10


@pytest.mark.parametrize('D', ['token', 'head', 'none'])
@pytest.mark.parametrize('backend', ['reference', 'chunked'])
def test_matrix_is_what_mix_applies(mix_inputs, backend, D):
    inputs = mix_inputs(L=65, G=2, D=D)
    M = quasiseparable_matrix(*(inputs[k] for k in ('dt_f', 'dt_b', 'A', 'B_f', 'C_f', 'B_b', 'C_b', 'D')))
    assert M.shape == (2, 4, 65, 65)
    expected = torch.einsum('bhij,bjhp->bihp', M, inputs['x'])
    assert relative(quasiseparable_mix(**inputs, backend=backend), expected) < 1e-13


def test_matrix_is_quasiseparable(mix_inputs):
    """Every block strictly below or above the diagonal has rank N at most; the diagonal is free."""
    inputs = mix_inputs(L=24, N=3)
    M = quasiseparable_matrix(*(inputs[k] for k in ('dt_f', 'dt_b', 'A', 'B_f', 'C_f', 'B_b', 'C_b', 'D')))
    for k in (4, 12, 20):
        assert torch.linalg.matrix_rank(M[..., k:, :k]).max() <= 3
        assert torch.linalg.matrix_rank(M[..., :k, k:]).max() <= 3
    torch.testing.assert_close(M.diagonal(dim1=-2, dim2=-1), inputs['D'].transpose(1, 2))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
@pytest.mark.parametrize('dt', ['zero', 'large', 'mixed'])
@pytest.mark.parametrize('A', ['weak', 'strong'])
@pytest.mark.parametrize('backend', ['reference', 'chunked'])
def test_extremes_are_finite_with_finite_gradients(mix_inputs, backend, A, dt, dtype):
    inputs = mix_inputs(L=197, P=2, N=4, A=A, dt=dt, init_states=True, dtype=dtype).requires_grad_()
    y = quasiseparable_mix(**inputs, backend=backend)
    assert y.dtype == dtype
    assert torch.isfinite(y).all()
    y.float().square().mean().backward()
    for name, t in inputs.items():
        assert torch.isfinite(t.grad).all(), name


@pytest.mark.parametrize(('D', 'init_states'), [('token', True), ('head', False), ('none', False)])
@pytest.mark.parametrize('L', [1, 2, 7])
@pytest.mark.parametrize('form', [mix_dense, mix_recurrence, mix_chunked], ids=lambda f: f.__name__)
def test_gradcheck(mix_inputs, form, L, D, init_states):
    inputs = mix_inputs(B=2, L=L, H=2, P=2, N=2, G=2, D=D, init_states=init_states).requires_grad_()
    names = [k for k, v in inputs.items() if v is not None]
    options = [{}] if form is not mix_chunked else [{}, {'chunk_size': 4, 'tile_size': 2}, {'chunk_size': 1}]
    for option in options:

        def function(*tensors, option=option):
            return form(**{**dict.fromkeys(inputs), **dict(zip(names, tensors))}, **option)

        assert torch.autograd.gradcheck(function, tuple(inputs[k] for k in names), fast_mode=True)


@pytest.mark.parametrize('L', [2, 65, 197])
def test_gradients_agree(mix_inputs, L):
    grads = []
    for form in (mix_dense, mix_chunked, mix_recurrence):
        inputs = mix_inputs(L=L, G=2, dt='mixed', init_states=True).requires_grad_()
        form(**inputs).sin().sum().backward()
        grads.append({k: v.grad for k, v in inputs.items()})
    for name in grads[0]:
        assert relative(grads[1][name], grads[0][name]) < 1e-10, name
        assert relative(grads[2][name], grads[0][name]) < 1e-10, name


@pytest.mark.parametrize('backend', ['reference', 'chunked'])
@pytest.mark.parametrize('B', [0, 1])
def test_batch_zero_and_one(mix_inputs, B, backend):
    inputs = mix_inputs(B=B, L=65)
    y = quasiseparable_mix(**inputs, backend=backend)
    assert y.shape == (B, 65, 4, 3)
    if B:
        assert relative(y, mix_recurrence(**inputs)) < 1e-12


@pytest.mark.parametrize('backend', ['reference', 'chunked'])
def test_non_contiguous_inputs(mix_inputs, backend):
    inputs = mix_inputs(L=65, G=2)
    expected = quasiseparable_mix(**inputs, backend=backend)
    strided = {k: torch.stack([v, v], -1)[..., 0] for k, v in inputs.items() if v is not None}
    strided['x'] = inputs['x'].transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(v.is_contiguous() for v in strided.values())
    assert relative(quasiseparable_mix(**strided, backend=backend), expected) < 1e-14


def test_chunked_slices_and_derivatives_of_every_kind(mix_inputs, monkeypatch):
    """Chunks in slices of three, the last one shorter; second, batched and forward-mode derivatives as well."""
    monkeypatch.setattr(chunked, '_SLICE', 6 * 2**2)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 1)
    inputs = mix_inputs(B=1, L=14, H=2, P=2, N=2, G=2).requires_grad_()
    names = [name for name, t in inputs.items() if t is not None]

    def function(*tensors):
        return mix_chunked(**{**dict.fromkeys(inputs), **dict(zip(names, tensors))}, chunk_size=2, tile_size=1)

    arguments = tuple(inputs[name] for name in names)
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True, check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)
    assert relative(function(*arguments), mix_dense(**inputs)) < 1e-13


def test_chunked_memory_is_linear(mix_inputs):
    """Peak of live tensors, counted by the saved tensors of autograd: fourfold length, about fourfold memory."""

    def saved_bytes(L: int) -> int:
        total = 0

        def pack(t: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += t.numel() * t.element_size()
            return t

        inputs = mix_inputs(B=1, L=L, dtype=torch.float32).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            quasiseparable_mix(**inputs, backend='chunked')
        return total

    assert saved_bytes(8192) < 4.5 * saved_bytes(2048)


def test_chunked_uses_no_flip_or_roll(mix_inputs):
    from torch.profiler import ProfilerActivity, profile

    inputs = mix_inputs(L=600, init_states=True)
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        quasiseparable_mix(**inputs, backend='chunked')
    names = {event.key for event in prof.key_averages()}
    assert not names & {'aten::flip', 'aten::roll'}, names


@pytest.mark.parametrize(
    ('name', 'change', 'error'),
    [
        ('x', lambda t: t[:, :-1], ValueError),
        ('x', lambda t: t.flatten(2), ValueError),
        ('x', lambda t: t.long(), TypeError),
        ('x', lambda t: None, TypeError),
        ('dt_f', lambda t: t[..., None], ValueError),
        ('dt_f', lambda t: t[:, :0], ValueError),
        ('dt_b', lambda t: t[..., :-1], ValueError),
        ('dt_b', lambda t: t.half(), TypeError),
        *(('A', change, ValueError) for change in (torch.abs, lambda t: t * 0, lambda t: t * float('nan'))),
        ('A', lambda t: t[:-1], ValueError),
        ('B_f', lambda t: t[:, :, 0], ValueError),
        ('B_f', lambda t: t.repeat(1, 1, 3, 1), ValueError),
        ('C_b', lambda t: t[..., :-1], ValueError),
        ('C_f', lambda t: t.float(), TypeError),
        ('D', lambda t: t[..., :-1], ValueError),
        ('D', lambda t: t.sum((0, 1))[:-1], ValueError),
        ('init_states', lambda t: t[:-1], ValueError),
        ('B_b', lambda t: t.to('meta'), ValueError),
    ],
)
def test_bad_input_names_the_argument(mix_inputs, name, change, error):
    inputs = mix_inputs(init_states=True)
    inputs[name] = change(inputs[name])
    with pytest.raises(error, match=f'^{name} '):
        quasiseparable_mix(**inputs)


def test_float32_side_arguments_are_allowed_beside_bfloat16(mix_inputs):
    inputs = mix_inputs(L=20, dtype=torch.bfloat16)
    y = quasiseparable_mix(**inputs)
    for name in ('dt_f', 'dt_b', 'A', 'D'):
        inputs[name] = inputs[name].float()
    torch.testing.assert_close(quasiseparable_mix(**inputs), y)


def test_autocast_does_not_reach_the_decays(mix_inputs):
    inputs = mix_inputs(L=197, dtype=torch.float32)
    expected = quasiseparable_mix(**inputs)
    with torch.autocast('cpu', torch.bfloat16):
        y = quasiseparable_mix(**inputs)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_values_of_A_are_not_needed_where_they_cannot_be_read(mix_inputs):
    inputs = mix_inputs()
    A = torch.stack([inputs.pop('A'), torch.full((4,), -2.0, dtype=torch.float64)])
    y = torch.func.vmap(lambda A: quasiseparable_mix(A=A, **inputs))(A)
    torch.testing.assert_close(y, torch.stack([quasiseparable_mix(A=row, **inputs) for row in A]))
    mode = FakeTensorMode()
    fake = {name: None if t is None else mode.from_tensor(t) for name, t in {'A': A[0], **inputs}.items()}
    with mode:
        assert quasiseparable_mix(**fake).shape == inputs['x'].shape
