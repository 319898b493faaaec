"""The peers of the operator, their packages replaced by a causal recurrence with the same contract."""

import sys
import types

import pytest
import torch

from hydra_vision.bench import operators
from hydra_vision.bench.operators import OperatorCase, Shape, run_shape
from hydra_vision.bench.peers import PEERS, implementation, mix_simple_gla, unusable
from hydra_vision.bench.roofline import Roofline
from hydra_vision.ops import quasiseparable_mix

CPU = torch.device('cpu')


def parallel_simple_gla(q, k, v, g=None, scale=None, output_attentions=False):
    """o_i = scale sum_{j <= i} exp(sum_{j < m <= i} g_m) q_i . k_j v_j; (B, T, H, ...) each. As fla-core 0.6 has it."""
    sums = g.cumsum(1)
    decay = torch.tril((sums[:, :, None] - sums[:, None]).permute(0, 3, 1, 2).exp())  # (B, H, T, T)
    scores = torch.einsum('bihk,bjhk->bhij', q, k) * scale * decay
    return torch.einsum('bhij,bjhv->bihv', scores, v), None


@pytest.fixture
def fla(monkeypatch):
    module = types.ModuleType('fla.ops.simple_gla')
    module.parallel_simple_gla = parallel_simple_gla
    for name in ('fla', 'fla.ops'):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, 'fla.ops.simple_gla', module)


@pytest.mark.parametrize('G', [1, 2])
def test_simple_gla_composes_two_causal_scans(fla, G):
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
    assert set(PEERS) <= set(reasons)
    assert reasons['chunked'] is None
    assert all(reasons[name] for name in PEERS)
    assert reasons['mamba_ssm/64'] == reasons['mamba_ssm']


def test_a_peer_that_fails_is_a_row_and_ours_an_error(monkeypatch):
    def broken(name):
        def mix(**arguments):
            raise ValueError(f'{name} refuses this compiler\nand says more')

        return mix

    monkeypatch.setattr(operators, 'implementation', broken)
    how = {'rounds': 3, 'time_limit': 0.0, 'progress': lambda text: None}
    shape = Shape(1, 4, 1, 4, 4)
    (row,) = run_shape([OperatorCase('simple_gla', shape, 'infer', torch.float32)], CPU, Roofline(1, 1), **how)
    assert row.timing is None
    assert row.status == 'ValueError: simple_gla refuses this compiler'
    with pytest.raises(ValueError, match='refuses'):
        run_shape([OperatorCase('chunked', shape, 'infer', torch.float32)], CPU, Roofline(1, 1), **how)


def test_names_are_implementations():
    arguments = {'x': torch.randn(1, 4, 1, 4), 'dt_f': torch.ones(1, 4, 1), 'dt_b': torch.ones(1, 4, 1)}
    arguments |= {'A': -torch.ones(1), **{name: torch.randn(1, 4, 1, 4) for name in ('B_f', 'C_f', 'B_b', 'C_b')}}
    torch.testing.assert_close(implementation('chunked')(**arguments), implementation('reference')(**arguments))
    assert implementation('mamba_ssm/64').keywords == {'chunk_size': 64}
