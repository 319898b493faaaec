"""The Triton kernels at small sizes: on the GPU, or in Triton's interpreter (see test_triton_interpreter.py)."""

import os
from contextlib import contextmanager

import pytest
import torch
from triton_checks import check_inner, check_mix, inner_arguments, mix_arguments, poison_memory, value_and_grads

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = 'cpu' if INTERPRETED else 'cuda'
SEEDS = 1 if INTERPRETED else 8
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
TOKENS = 5 if INTERPRETED else 33  # where the length does not matter: the interpreter is slow


@pytest.mark.parametrize(
    ('L', 'H', 'G', 'D', 'init_states'),
    [
        (1, 2, 1, 'token', True),
        (16, 1, 1, None, False),
        (17, 2, 2, 'head', True),
        (50, 2, 1, 'token', False),
    ],
)
def test_mix_matches_the_dense_form(L, H, G, D, init_states):
    from hydra_vision.ops.triton.plan import forced_launch
    from hydra_vision.ops.triton.table import Launch

    with forced_launch(Launch(16, heads={'mix_heads': 2})):
        check_mix(1, L, H, 16, G, 16, torch.float32, DEVICE, SEEDS, D=D, init_states=init_states)


@pytest.mark.parametrize(('H', 'G'), [(2, 1), (3, 1), (6, 2)])
def test_heads_that_no_program_shares(H, G):
    """The scores' gradient then comes in H / G parts: with two, and with more, which are added in another way."""
    from hydra_vision.ops.triton.plan import forced_launch
    from hydra_vision.ops.triton.table import Launch

    with forced_launch(Launch(16, heads={'mix_heads': 1, 'dx_heads': 1, 'scores_heads': 1})):
        check_mix(1, 20, H, 16, G, 16, torch.float32, DEVICE, SEEDS)


@pytest.fixture
def plans(monkeypatch):
    """Those of the forwards that the test runs, with fresh memory full of NaN: what nobody computes nobody may read."""
    from hydra_vision.ops.triton import function, inner, mixing

    def mix_forward(plan, *args):
        found.append(plan)
        return mixing.mix_forward(plan, *args)

    found = []
    for module in (function, inner):
        monkeypatch.setattr(module, 'mix_forward', mix_forward)
    poison_memory(monkeypatch)
    return found


@pytest.mark.parametrize(
    ('L', 'tile', 'spans', 'G', 'init_states'),
    [
        (10, 64, ((1, 16),), 1, True),
        (36, 32, ((1, 32), (1, 16)), 2, True),
        (84, 64, ((1, 64), (1, 32)), 1, False),
    ],
)
def test_short_last_tile(L, tile, spans, G, init_states, plans):
    """In a launch of its own, over few rows."""
    from hydra_vision.ops.triton.plan import forced_launch
    from hydra_vision.ops.triton.table import Launch

    with forced_launch(Launch(tile, tail=1)):
        check_mix(1, L, 2, 16, G, 16, torch.float32, DEVICE, SEEDS, init_states=init_states)
    assert plans
    assert all(plan.spans == spans for plan in plans)


@pytest.mark.parametrize(('L', 'share_bc', 'dtype'), [(10, True, torch.float16), (33, False, torch.float32)], ids=str)
def test_short_last_tile_of_the_whole_mixer(L, share_bc, dtype, plans):
    from hydra_vision.ops.triton.plan import forced_launch
    from hydra_vision.ops.triton.table import Launch

    with forced_launch(Launch(32, tail=1)):
        check_inner(1, L, 2, 16, 2, 16, dtype, DEVICE, SEEDS, share_bc=share_bc, init_states=share_bc)
    assert plans
    assert all(plan.spans[-1] == (1, 16) for plan in plans)


def test_mix_with_extreme_steps():
    check_mix(1, 40, 3, 16, 1, 16, torch.float32, DEVICE, SEEDS, extreme=True)


PLAIN = (7, False, False, True, (0.0, float('inf')))
SHARED = (7, True, True, False, (0.05, 0.5))
NARROW = (3, False, True, True, (0.1, 9.0))


@pytest.mark.parametrize(
    ('dtype', 'K', 'share_bc', 'init_states', 'bias', 'dt_limit'),
    [
        (dtype, *options)
        for dtype in DTYPES
        for options in (PLAIN, SHARED, NARROW)
        if not INTERPRETED or (dtype == torch.float32) != (options is SHARED)  # each option and each dtype there too
    ],
)
def test_inner_matches_the_dense_form(dtype, K, share_bc, init_states, bias, dt_limit):
    options = {'K': K, 'share_bc': share_bc, 'init_states': init_states, 'bias': bias}
    check_inner(2, 20, 2, 16, 1, 16, dtype, DEVICE, SEEDS, dt_limit, **options)


def test_inner_of_a_slice_with_unaligned_rows():
    from triton_checks import hydra_inner

    tensors = [None if t is None else t.to(DEVICE) for t in inner_arguments(2, TOKENS, 3, 16, 1, 16)]
    whole = torch.nn.functional.pad(tensors[0], (1, 2))

    def run(z):
        return hydra_inner(z, *tensors[1:8], headdim=16, d_state=16)

    expected = value_and_grads(lambda a: run(a[0]), [tensors[0]])
    y, grad = value_and_grads(lambda a: run(a[0][..., 1:-2]), [whole])
    torch.testing.assert_close(y, expected[0], rtol=0, atol=0)
    torch.testing.assert_close(grad[..., 1:-2], expected[1], rtol=0, atol=0)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
def test_closed_gates_keep_their_gradients(dtype):
    """The backward divides the output by w * SiLU(z), which here is zero or as good as zero."""
    from hydra_vision.ops import hydra_inner

    tensors = inner_arguments(2, 9, 2, 16, 1, 16)[:8]
    tensors[0][0, :, :8] = 0.0  # z
    tensors[0][1, :, 8:16] = -120.0
    tensors[7][4:12] = 0.0  # norm weight
    sizes = {'headdim': 16, 'd_state': 16}
    exact = value_and_grads(lambda a: hydra_inner(*a, **sizes, backend='reference'), [t.double() for t in tensors])
    tensors = [t.to(DEVICE) for t in tensors]
    tensors[0] = tensors[0].to(dtype)
    ours = value_and_grads(lambda a: hydra_inner(*a, **sizes, backend='triton'), tensors)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-3
    for found, expected in zip(ours, exact):
        assert float((found.cpu().double() - expected).norm()) <= tolerance * float(expected.norm())


def test_parameters_with_gaps():
    """Slices and expanded tensors as the parameters that are one number a head or channel."""
    from hydra_vision.ops import hydra_inner, quasiseparable_mix

    def with_gaps(t):
        wide = torch.full((*t.shape, 3), 7.0, device=DEVICE)
        wide[..., 1] = t
        return wide[..., 1]

    tensors = [t.to(DEVICE) for t in inner_arguments(1, 9, 3, 16, 1, 16)[:8]]
    gaps = [tensors[0], *(with_gaps(t) for t in tensors[1:])]
    whole, parts = (hydra_inner(*a, headdim=16, d_state=16, backend='triton') for a in (tensors, gaps))
    assert torch.equal(whole, parts)
    arguments = [t.to(DEVICE) for t in mix_arguments(1, 9, 3, 16, 1, 16, D='head')[:9]]
    arguments[3] = -torch.ones((), device=DEVICE).expand(3)
    gaps = [with_gaps(t) if k == 8 else t for k, t in enumerate(arguments)]
    arguments[3] = arguments[3].contiguous()
    whole, parts = (quasiseparable_mix(*a, backend='triton') for a in (arguments, gaps))
    assert torch.equal(whole, parts)


def test_scores_beyond_the_range_of_float16():
    """C . B reaches 150,000; with the step sizes in it the result fits."""
    from hydra_vision.ops import quasiseparable_mix

    tensors = mix_arguments(1, 40, 2, 16, 1, 64)[:9]
    for k in (1, 2):
        tensors[k] *= 0.02
    for k in (4, 5, 6, 7):
        tensors[k] = 40 * tensors[k].abs()
    tensors = [t.to(DEVICE, torch.float16) if k in (0, 4, 5, 6, 7) else t.to(DEVICE) for k, t in enumerate(tensors)]
    expected = value_and_grads(lambda a: quasiseparable_mix(*a, backend='chunked'), tensors)
    assert expected[0].abs().max() < 10000
    found = value_and_grads(lambda a: quasiseparable_mix(*a, backend='triton'), tensors)
    for ours, theirs in zip(found, expected):
        assert float((ours.float() - theirs.float()).norm()) <= 4e-3 * float(theirs.float().norm())


@pytest.mark.slow
def test_saved_tensors_given_back_in_another_layout():
    from triton_checks import hydra_inner

    def other_layout(t):
        return t.transpose(0, 1).contiguous().transpose(0, 1) if t.ndim > 1 else t

    tensors = [t.to(DEVICE) for t in inner_arguments(2, TOKENS, 2, 16, 1, 16)[:8]]
    expected = value_and_grads(lambda a: hydra_inner(*a, headdim=16, d_state=16), tensors)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, other_layout):
        found = value_and_grads(lambda a: hydra_inner(*a, headdim=16, d_state=16), tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_empty_batch():
    from triton_checks import hydra_inner

    from hydra_vision.ops.triton.api import quasiseparable_mix

    tensors = [None if t is None else t.to(DEVICE) for t in inner_arguments(0, 9, 2, 16, 1, 16)]
    y, *grads = value_and_grads(lambda a: hydra_inner(*a[:8], headdim=16, d_state=16), tensors)
    assert y.shape == (0, 9, 32)
    assert all(not g.any() for g in grads)
    arguments = [None if t is None else t.to(DEVICE) for t in mix_arguments(0, 5, 2, 16, 1, 16)]
    y, *grads = value_and_grads(lambda a: quasiseparable_mix(*a), arguments)
    assert y.shape == (0, 5, 2, 16)


def test_second_derivative_is_refused():
    from hydra_vision.ops.triton.api import quasiseparable_mix

    arguments = [None if t is None else t.to(DEVICE).requires_grad_() for t in mix_arguments(1, 3, 1, 16, 1, 16)]
    y = quasiseparable_mix(*arguments)
    with pytest.raises(RuntimeError, match='second derivatives'):
        torch.autograd.grad(y.sum(), arguments[0], create_graph=True)


def test_transforms_are_refused():
    from triton_checks import hydra_inner

    from hydra_vision.ops.triton.api import quasiseparable_mix

    arguments = [None if t is None else t.to(DEVICE) for t in mix_arguments(1, 3, 1, 16, 1, 16)]
    with pytest.raises(RuntimeError, match=r'transforms of torch\.func'):
        torch.func.grad(lambda x: quasiseparable_mix(x, *arguments[1:]).sum())(arguments[0])
    z, *others = (t.to(DEVICE) for t in inner_arguments(2, 3, 1, 16, 1, 16)[:8])
    with pytest.raises(RuntimeError, match=r'transforms of torch\.func'):
        torch.func.vmap(lambda z: hydra_inner(z[None], *others, headdim=16, d_state=16))(z)

    def derivative(x):
        return torch.func.jvp(lambda x: quasiseparable_mix(x, *arguments[1:]), (x,), (x,))[1]

    for function in (derivative, torch.compile(derivative, backend='eager', fullgraph=True)):
        with pytest.raises(RuntimeError, match='forward-mode'):
            function(arguments[0])


def test_operators_pass_opcheck():
    from hydra_vision.ops.triton.library import hydra_inner_op, quasiseparable_mix_op

    tests = ('test_schema', 'test_faketensor', 'test_autograd_registration')
    tensors = [None if t is None else t.to(DEVICE).requires_grad_() for t in inner_arguments(1, 9, 2, 16, 1, 16)]
    numbers = (16, 16, 1, False, 0.0, float('inf'), 1e-5)
    for late in (False, True):
        torch.library.opcheck(hydra_inner_op, (*tensors, *numbers, late, None), test_utils=tests)
    segments = torch.arange(9, device=DEVICE, dtype=torch.int32) // 4
    torch.library.opcheck(hydra_inner_op, (*tensors, *numbers, True, segments), test_utils=tests)
    arguments = [None if t is None else t.to(DEVICE).requires_grad_() for t in mix_arguments(1, 9, 2, 16, 1, 16)]
    torch.library.opcheck(quasiseparable_mix_op, tuple(arguments), test_utils=tests)


@pytest.mark.slow
def test_compiled_mixer_is_one_graph_and_equal():
    from hydra_vision import Hydra

    torch._dynamo.reset()
    mixer = Hydra(16, d_state=16, headdim=16, backend='triton').to(DEVICE)
    compiled = torch.compile(mixer, fullgraph=True, backend='aot_eager')
    u = torch.randn(2, TOKENS, 16, device=DEVICE)
    parameters = list(mixer.parameters())
    expected = value_and_grads(lambda a: mixer(a[0]), [u])
    found = value_and_grads(lambda a: compiled(a[0]), [u])
    assert all(torch.equal(a, b) for a, b in zip(expected, found))
    graphs = torch._dynamo.utils.counters['stats']['unique_graphs']
    compiled(torch.randn(3, TOKENS, 16, device=DEVICE))
    dynamic = torch._dynamo.utils.counters['stats']['unique_graphs']
    compiled(torch.randn(5, TOKENS, 16, device=DEVICE))
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == dynamic <= graphs + 1
    assert all(p.grad is None for p in parameters)


def test_export():
    from hydra_vision import Hydra

    mixer = Hydra(16, d_state=16, headdim=16, backend='triton').to(DEVICE).eval()
    u = torch.randn(2, TOKENS, 16, device=DEVICE)
    program = torch.export.export(mixer, (u,), dynamic_shapes={'u': {0: torch.export.Dim('batch', max=64)}})
    v = torch.randn(3, TOKENS, 16, device=DEVICE)
    assert torch.equal(program.module()(v), mixer(v))


@pytest.mark.slow
def test_tuning_reports_what_runs_and_what_does_not(monkeypatch, capsys):
    """The measuring loop; times mean nothing here. A candidate with wrong results is named as such."""
    from hydra_vision.ops.triton import plan, tune
    from hydra_vision.ops.triton.api import quasiseparable_mix
    from hydra_vision.ops.triton.table import Launch

    def arguments(*sizes):
        tensors = mix_arguments(*sizes[:4], 1, sizes[4])[:9]
        return [t.to(DEVICE).requires_grad_() for t in tensors]

    def time(function, repeats):
        function()
        times.append(repeats)
        return 1.0 / len(times)

    def mix(*given):
        return quasiseparable_mix(*given) * (2.0 if forced[-1].tail == 3 else 1.0)

    @contextmanager
    def forced_launch(launch):
        forced.append(launch)
        with plan.forced_launch(launch):
            yield

    times, forced = [], []
    monkeypatch.setattr(tune, '_arguments', arguments)
    monkeypatch.setattr(tune, '_time', time)
    monkeypatch.setattr(tune, 'quasiseparable_mix', mix)
    monkeypatch.setattr(tune, 'forced_launch', forced_launch)
    monkeypatch.setattr(tune, 'candidates', lambda start: [Launch(16), Launch(16, tail=2), Launch(16, tail=3)])
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *a: (9, 0))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda *a: 'a GPU')
    options = '--length 5 --batch 1 --heads 2 --headdim 16 --d-state 16 --dtype float32 --repeats 2'
    assert tune.main(options.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [' not usable: its results are wrong ' in line for line in lines[:3]] == [False, False, True]
    assert lines[-1].startswith("(90, 256, 16, 16, 'float32'): Launch(tile=16")
    assert lines[-1].endswith('tail=2)')
    assert times == [2] * 4


@pytest.mark.parametrize(
    ('dtype', 'options'),
    [(torch.float32, {}), (torch.float32, dict(K=3, share_bc=True)), (DTYPES[-1], {})],
    ids=str,
)
def test_packed_sequences(dtype, options, monkeypatch):
    """Borders within tiles of 16 tokens, at their edges, and a sequence longer than a tile."""
    from hydra_vision.ops import quasiseparable_mix

    poison_memory(monkeypatch)
    cu_seqlens = torch.tensor([0, 1, 6, 8, 16, 37, 40], device=DEVICE)
    check_inner(1, 40, 2, 16, 1, 16, dtype, DEVICE, SEEDS, cu_seqlens=cu_seqlens, **options)
    arguments = [t.to(DEVICE) for t in mix_arguments(1, 40, 2, 16, 1, 16)[:9]]
    y, expected = (quasiseparable_mix(*arguments, cu_seqlens=cu_seqlens, backend=b) for b in ('triton', 'reference'))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
