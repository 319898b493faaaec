"""The peers of the operator, their packages replaced by a causal recurrence with the same contract."""

import importlib.util
import sys
import types

import pytest
import torch

from hydra_vision.bench import operators
from hydra_vision.bench.operators import OperatorCase, Shape, operator_inputs, run_shape
from hydra_vision.bench.peers import PEERS, SCANS, implementation, mix_simple_gla, scan_alone, unusable
from hydra_vision.bench.roofline import Roofline
from hydra_vision.cli import main
from hydra_vision.ops import mamba_ssm as two_scans
from hydra_vision.ops import quasiseparable_mix
from hydra_vision.ops.mamba_ssm import join_directions

CPU = torch.device('cpu')


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


@pytest.mark.parametrize('G', [1, 2])
def test_simple_gla_composes_two_causal_scans(packages, G):
    generator = torch.Generator().manual_seed(0)
    x, dt_f, dt_b = (torch.rand(2, 9, 4, *s, generator=generator) for s in ((3,), (), ()))
    bc = [torch.randn(2, 9, G, 5, generator=generator) for _ in range(4)]
    arguments = (x, dt_f, dt_b, -torch.ones(4), *bc)
    for D in (None, torch.rand(4), torch.rand(2, 9, 4)):
        torch.testing.assert_close(
            mix_simple_gla(*arguments, D), quasiseparable_mix(*arguments, D, backend='reference')
        )


def test_what_cannot_run_says_why():
    reasons = unusable(CPU)
    assert {*PEERS, *SCANS} <= set(reasons)
    assert reasons['chunked'] is None
    assert all(reasons[name] for name in (*PEERS, *SCANS))
    assert reasons['mamba_ssm/64'] == reasons['mamba_ssm/64/scan'] == reasons['mamba_ssm']
    assert reasons['simple_gla/scan'] == reasons['simple_gla']


@pytest.mark.parametrize('name', ['simple_gla', 'simple_gla/scan'])
def test_a_missing_package_names_its_extra(monkeypatch, capsys, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda n, *a: None if n == 'fla' else find(n, *a))
    assert main(['bench', '--device', 'cpu', '--operator', '--backend', f'chunked,{name}']) == 2
    message = capsys.readouterr().err
    assert f'--backend: {name} cannot run here: the package fla-core is not installed' in message
    assert "pip install 'hydra-vision[fla]'" in message


def test_a_peer_that_fails_is_a_row_and_ours_an_error(monkeypatch):
    def broken(name):
        def mix(**arguments):
            raise ValueError(f'{name} refuses this compiler\nand says more')

        return mix

    monkeypatch.setattr(operators, 'implementation', broken)
    monkeypatch.setattr(operators, 'scan_alone', lambda name, arguments: (broken(name), []))
    how = {'rounds': 3, 'time_limit': 0.0, 'progress': lambda text: None}
    shape = Shape(1, 4, 1, 4, 4)
    for name in ('simple_gla', 'simple_gla/scan'):
        (row,) = run_shape([OperatorCase(name, shape, 'infer', torch.float32)], CPU, Roofline(1, 1), **how)
        assert row.timing is None
        assert row.status == f'ValueError: {name} refuses this compiler'
    with pytest.raises(ValueError, match='refuses'):
        run_shape([OperatorCase('chunked', shape, 'infer', torch.float32)], CPU, Roofline(1, 1), **how)


def test_names_are_implementations():
    arguments = {'x': torch.randn(1, 4, 1, 4), 'dt_f': torch.ones(1, 4, 1), 'dt_b': torch.ones(1, 4, 1)}
    arguments |= {'A': -torch.ones(1), **{name: torch.randn(1, 4, 1, 4) for name in ('B_f', 'C_f', 'B_b', 'C_b')}}
    torch.testing.assert_close(implementation('chunked')(**arguments), implementation('reference')(**arguments))
    assert implementation('mamba_ssm/64').keywords == {'chunk_size': 64}


@pytest.mark.parametrize('name', SCANS)
@pytest.mark.parametrize('G', [1, 2])
def test_scan_alone_is_the_operator_but_for_its_ends(packages, name, G):
    shape = Shape(2, 9, 4, 3, 5)
    arguments = operator_inputs(shape, torch.float32, CPU)
    arguments |= {key: torch.randn(2, 9, G, 5) for key in ('B_f', 'C_f', 'B_b', 'C_b')}
    scan, inputs = scan_alone(name, arguments)
    y = scan(*inputs)
    assert y.shape == (4, 9, 4, 3)
    del arguments['D']
    torch.testing.assert_close(join_directions(y), quasiseparable_mix(**arguments, backend='reference'))
    if name != 'simple_gla/scan':
        chunk_size = {'mamba_ssm/scan': 256, 'mamba_ssm/128/scan': 128, 'mamba_ssm/64/scan': 64}[name]
        assert [call['chunk_size'] for call in packages] == [chunk_size]


@pytest.mark.parametrize('name', SCANS)
def test_inputs_of_a_scan_depend_on_nothing(packages, name):
    """A gradient that is asked of them is not asked of the arguments, which all cases share."""
    arguments = operator_inputs(Shape(1, 5, 2, 3, 4), torch.float32, CPU)
    arguments['x'].requires_grad_()
    scan, inputs = scan_alone(name, arguments)
    own = {t.data_ptr() for t in arguments.values()}
    assert all(t.is_leaf and not t.requires_grad and t.data_ptr() not in own for t in inputs)
    for t in inputs:
        t.requires_grad_()
    assert not arguments['A'].requires_grad
    assert all(g is not None for g in torch.autograd.grad(scan(*inputs).sum(), inputs))


@pytest.mark.parametrize('mode', ['infer', 'train'])
def test_a_timed_step_is_the_scan_and_nothing_else(packages, monkeypatch, mode):
    """Flips, concatenation, shift and sum run while a case is set up, never again."""
    shape, ends = Shape(1, 6, 2, 3, 4), []
    arguments = operator_inputs(shape, torch.float32, CPU)
    double = two_scans.double_batch
    monkeypatch.setattr('hydra_vision.bench.peers.double_batch', lambda **a: ends.append('double') or double(**a))
    monkeypatch.setattr(two_scans, 'join_directions', lambda y: ends.append('join') or y)
    for name in SCANS:
        ends.clear()
        step = operators._operator_step(OperatorCase(name, shape, mode, torch.float32), arguments)
        assert ends == ['double']
        packages.clear()
        results = [step(), step()]
        assert ends == ['double']
        assert len(packages) == 2
        if mode == 'infer':
            assert results[0].shape == (2, 6, 2, 3)
        else:
            (x_or_q, *others), count = results[0], {True: 4, False: 5}[name.startswith('simple_gla')]
            assert len(x_or_q) == 2  # a gradient of the doubled batch
            assert len(others) + 1 == count
            assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_run_with_complete_peers_and_scans(packages):
    how = {'rounds': 3, 'time_limit': 0.0, 'progress': lambda text: None}
    names = ('reference', *PEERS, *SCANS)
    cases = [OperatorCase(name, Shape(1, 4, 2, 3, 4), 'train', torch.float32) for name in names]
    rows = {r.case.backend: r for r in run_shape(cases, CPU, Roofline(1, 1), **how)}
    # 'mamba_ssm' by its backend asks for CUDA
    assert [name for name in names if rows[name].status != 'ok'] == ['mamba_ssm']
    assert all(rows[name].timing is not None for name in SCANS)
