"""The operator next to its peers, whose packages are replaced by a causal recurrence with the same contract."""

import importlib.util
import sys
import types

import pytest
import torch

from benchmarks import operators
from benchmarks.operators import (
    PEERS,
    SCANS,
    Case,
    build_step,
    implementation,
    main,
    mix_simple_gla,
    operator_inputs,
    scan_alone,
    time_shape,
    unusable,
    verdicts,
)
from hydra_vision import bench
from hydra_vision.errors import UserError
from hydra_vision.io import read_csv
from hydra_vision.ops import mamba_ssm as two_scans
from hydra_vision.ops import quasiseparable_mix
from hydra_vision.ops.mamba_ssm import join_directions
from hydra_vision.timing import Measurement, Roofline, Timing

CPU = torch.device('cpu')
QUICK = {'rounds': 3, 'time_limit': 0.0, 'burst': 0.0}


def parallel_simple_gla(q, k, v, g=None, scale=None, output_attentions=False):
    """o_i = scale sum_{j <= i} exp(sum_{j < m <= i} g_m) q_i . k_j v_j; (B, T, H, ...) each. As fla-core 0.6 has it."""
    sums = g.cumsum(1)
    decay = torch.tril((sums[:, :, None] - sums[:, None]).permute(0, 3, 1, 2).exp())  # (B, H, T, T)
    scores = torch.einsum('bihk,bjhk->bhij', q, k) * scale * decay
    return torch.einsum('bhij,bjhv->bihv', scores, v), None


def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, initial_states=None):
    """The same scan by the arguments of mamba_ssm."""
    assert initial_states is None
    k, q = (t.repeat_interleave(x.shape[2] // t.shape[2], dim=2) for t in (B, C))
    return parallel_simple_gla(q, k, x * dt.unsqueeze(-1), g=A * dt, scale=1.0)[0]


@pytest.fixture
def packages(monkeypatch):
    """Both, with a list of the calls of their scans: the keywords of each."""
    calls = []

    def noted(scan):
        def call(*args, **kwargs):
            calls.append(kwargs)
            return scan(*args, **kwargs)

        return call

    for scan, name in (
        (parallel_simple_gla, 'fla.ops.simple_gla'),
        (mamba_chunk_scan_combined, 'mamba_ssm.ops.triton.ssd_combined'),
    ):
        parts = name.split('.')
        for n in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, '.'.join(parts[:n]), types.ModuleType('.'.join(parts[:n])))
        setattr(sys.modules[name], scan.__name__, noted(scan))
    return calls


def case(name: str, mode: str = 'infer', sizes=(1, 6, 2, 3, 4), dtype=torch.float32) -> Case:
    return Case(name, *sizes, mode, dtype)


@pytest.mark.parametrize('G', [1, 2])
def test_simple_gla_composes_two_causal_scans(packages, G):
    generator = torch.Generator().manual_seed(0)
    x, dt_f, dt_b = (torch.rand(2, 9, 4, *s, generator=generator) for s in ((3,), (), ()))
    bc = [torch.randn(2, 9, G, 5, generator=generator) for _ in range(4)]
    arguments = (x, dt_f, dt_b, -torch.ones(4), *bc)
    for D in (None, torch.rand(4), torch.rand(2, 9, 4)):
        expected = quasiseparable_mix(*arguments, D, backend='reference')
        torch.testing.assert_close(mix_simple_gla(*arguments, D), expected)


@pytest.mark.parametrize('name', SCANS)
@pytest.mark.parametrize('G', [1, 2])
def test_scan_alone_is_the_operator_but_for_its_ends(packages, name, G):
    arguments = operator_inputs(case(name, sizes=(2, 9, 4, 3, 5)), CPU)
    arguments |= {key: torch.randn(2, 9, G, 5) for key in ('B_f', 'C_f', 'B_b', 'C_b')}
    arguments['x'].requires_grad_()
    scan, inputs = scan_alone(name, arguments)
    own = {t.data_ptr() for t in arguments.values()}  # a gradient of the inputs is none of the shared arguments
    assert all(t.is_leaf and not t.requires_grad and t.data_ptr() not in own for t in inputs)
    y = scan(*inputs)
    assert y.shape == (4, 9, 4, 3)
    del arguments['D']
    torch.testing.assert_close(join_directions(y), quasiseparable_mix(**arguments, backend='reference').detach())
    if name != 'simple_gla/scan':
        chunk_size = {'mamba_ssm/scan': 256, 'mamba_ssm/128/scan': 128, 'mamba_ssm/64/scan': 64}[name]
        assert [call['chunk_size'] for call in packages] == [chunk_size]


@pytest.mark.parametrize('mode', ['infer', 'train'])
def test_a_timed_step_is_the_scan_and_nothing_else(packages, monkeypatch, mode):
    """Flips, concatenation, shift and sum run while a case is set up, never again."""
    ends = []
    arguments = operator_inputs(case('mamba_ssm'), CPU)
    double = two_scans.double_batch
    monkeypatch.setattr(operators, 'double_batch', lambda **a: ends.append('double') or double(**a))
    monkeypatch.setattr(two_scans, 'join_directions', lambda y: ends.append('join') or y)
    for name in SCANS:
        ends.clear()
        step = build_step(case(name, mode), arguments)
        packages.clear()
        results = [step(), step()]
        assert ends == ['double']
        assert len(packages) == 2
        if mode == 'infer':
            assert results[0].shape == (2, 6, 2, 3)
        else:
            assert len(results[0]) == (4 if name.startswith('simple_gla') else 5)
            assert len(results[0][0]) == 2  # a gradient of the doubled batch
            assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_run_with_complete_peers_and_scans(packages):
    names = ('reference', *PEERS, *SCANS, 'sdpa')
    rows = {c.name: (c, m) for c, m in time_shape([case(name, 'train') for name in names], CPU, **QUICK).items()}
    # 'mamba_ssm' by its backend asks for CUDA: what another project's kernel cannot do is a row
    assert [name for name in names if rows[name][1].status != 'ok'] == ['mamba_ssm']
    assert [c.attention for c, _ in rows.values() if c.attention] == ['flash']
    chunked = implementation('mamba_ssm/64')
    assert chunked.keywords == {'chunk_size': 64}


def test_what_cannot_run_says_why(monkeypatch):
    reasons = unusable(CPU)
    assert reasons['chunked'] is None
    assert all(reasons[name] for name in (*PEERS, *SCANS))
    assert reasons['mamba_ssm/64'] == reasons['mamba_ssm/64/scan'] == reasons['mamba_ssm']
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda n, *a: None if n == 'fla' else find(n, *a))
    for name in ('simple_gla', 'simple_gla/scan'):
        with pytest.raises(UserError, match=f"{name} cannot run here: the package fla-core .*'hydra-vision\\[fla\\]'"):
            main(['--device', 'cpu', '--operators', f'chunked,{name}'])
    with pytest.raises(UserError, match="the nearest valid name is 'simple_gla/scan'"):
        main(['--device', 'cpu', '--operators', 'simple_gla/skan'])


def at_the_goal(**seconds: float) -> dict[Case, Measurement]:
    """Ours in a second, the others in 9 if not said otherwise (-1: failed); underscores double for slashes."""
    times = {'triton': 1.0, **dict.fromkeys((*PEERS, *SCANS), 9.0), 'sdpa': 0.1}
    times |= {name.replace('__', '/'): t for name, t in seconds.items()}
    sizes = (256, 196, 24, 64, 64)
    return {
        case(name, sizes=sizes, dtype=torch.bfloat16): Measurement(Timing((t,) * 3))
        if t > 0
        else Measurement(status='x')
        for name, t in times.items()
    }


def test_goals_take_the_best_peer_complete_and_alone():
    rows = at_the_goal(mamba_ssm__64=7.0, simple_gla=6.0, mamba_ssm__128__scan=3.0, simple_gla__scan=5.0)
    scan, complete = verdicts(rows, torch.device('cuda'))
    assert ('best scan alone' in scan['ratio'], scan['measured'], scan['goal'], scan['met']) == (True, 3, '>= 4', False)
    assert ('best complete peer' in complete['ratio'], complete['measured'], complete['met']) == (True, 6, None)
    assert verdicts(rows, CPU) == []
    assert {operators._speed_over(c, rows, SCANS) for c in rows if c.name == 'triton'} == {3.0}


@pytest.mark.parametrize('missing', ['triton', *PEERS, *SCANS])
def test_a_missing_or_failed_peer_is_no_row(missing):
    """The fastest of the others would be an easier goal."""
    left_out = {c: m for c, m in at_the_goal().items() if c.name != missing}
    for rows in (left_out, at_the_goal(**{missing.replace('/', '__'): -1.0})):
        goals = [row['goal'] for row in verdicts(rows, torch.device('cuda'))]
        assert goals == ([] if missing == 'triton' else [''] if missing in SCANS else ['>= 4'])


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, 'measure_roofline', lambda *a: Roofline(1e12, 1e12))
    options = '--device cpu --operators reference,chunked --shapes 1x20 --heads 2 --headdim 8 --d-state 4 --rounds 3'
    assert main([*options.split(), '--time-limit', '0', '--attention', 'math', '--output', str(tmp_path)]) == 0
    rows = read_csv(tmp_path / 'operators.csv')
    names = {'reference', 'chunked', 'sdpa'}
    assert {(r['operator'], r['B'], r['L'], r['passes']) for r in rows} == {
        (name, '1', '20', passes) for name in names for passes in ('forward', 'forward+backward')
    }
    assert {r['N'] for r in rows if r['operator'] == 'chunked'} == {'4'}
    assert {(r['H'], r['attention']) for r in rows if r['operator'] == 'sdpa'} == {('1', 'math')}
    printed = capsys.readouterr().out
    assert 'not measured: simple_gla/scan (' in printed
    assert 'speed / sdpa' in printed
    with pytest.raises(SystemExit):
        main(['--shapes', '4'])


@pytest.mark.gpu
def test_the_command_on_cuda(tmp_path):
    argv = ['--operators', 'triton,chunked,reference', '--shapes', '4x196', '--rounds', '3', '--time-limit', '0']
    assert main([*argv, '--output', str(tmp_path)]) == 0
    rows = read_csv(tmp_path / 'operators.csv')
    assert {r['operator'] for r in rows} == {'triton', 'chunked', 'reference', 'sdpa'}
    assert all(float(r['memory_floor_share']) > 0 for r in rows)
