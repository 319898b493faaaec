"""Choosing a backend: explicit choices run or raise, 'auto' is visible and can be steered."""

import sys
import types

import pytest
import torch

from hydra_vision.ops import available_backends, dispatch, quasiseparable_mix, set_default_backend
from hydra_vision.ops.reference import mix_recurrence, shift_tokens


@pytest.fixture(autouse=True)
def _restore_default(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    yield
    set_default_backend('auto')


def test_unknown_backend_is_named(mix_inputs):
    with pytest.raises(ValueError, match=r"unknown backend 'cuda'; allowed: 'auto', 'reference', 'chunked'"):
        quasiseparable_mix(**mix_inputs(), backend='cuda')
    with pytest.raises(ValueError, match='unknown backend'):
        set_default_backend('fast')


def test_available_backends_always_holds_the_portable_ones():
    assert {'reference', 'chunked'} <= set(available_backends()) <= set(dispatch.BACKENDS)


@pytest.mark.parametrize('backend', ['triton', 'mamba_ssm'])
def test_explicit_backend_never_falls_back(mix_inputs, backend, monkeypatch):
    monkeypatch.setattr(dispatch, '_triton_reason', lambda: 'no CUDA device is visible')
    monkeypatch.setattr(dispatch, '_mamba_ssm_reason', lambda: 'the package mamba-ssm is not installed')
    with pytest.raises(RuntimeError, match=f"backend '{backend}' is not available: .*available: reference, chunked"):
        quasiseparable_mix(**mix_inputs(), backend=backend)
    with pytest.raises(RuntimeError, match='is not available'):
        set_default_backend(backend)
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, backend)
    with pytest.raises(RuntimeError, match='is not available'):
        quasiseparable_mix(**mix_inputs())


def test_cpu_tensors_do_not_reach_a_cuda_backend(mix_inputs, monkeypatch):
    monkeypatch.setattr(dispatch, '_mamba_ssm_reason', lambda: None)
    with pytest.raises(RuntimeError, match="computes on CUDA tensors; the tensors are on 'cpu'"):
        quasiseparable_mix(**mix_inputs(), backend='mamba_ssm')


def test_environment_comes_before_the_process_default(monkeypatch):
    assert dispatch.default_backend('cpu') == ('chunked', 'default on cpu')
    set_default_backend('reference')
    assert dispatch.default_backend('cpu')[0] == 'reference'
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, 'chunked')
    assert dispatch.default_backend('cpu') == ('chunked', 'HYDRA_VISION_BACKEND is set')
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, 'nonsense')
    with pytest.raises(ValueError, match="HYDRA_VISION_BACKEND: unknown backend 'nonsense'"):
        dispatch.default_backend('cpu')


def test_auto_follows_the_default(mix_inputs):
    inputs = mix_inputs(L=65)
    chunked = quasiseparable_mix(**inputs, backend='chunked')
    reference = quasiseparable_mix(**inputs, backend='reference')
    assert not torch.equal(chunked, reference)  # equal to rounding only, so that the next lines can tell them apart
    assert torch.equal(quasiseparable_mix(**inputs), chunked)
    set_default_backend('reference')
    assert torch.equal(quasiseparable_mix(**inputs), reference)


def test_mamba_ssm_wrapper_composes_two_causal_scans(mix_inputs, monkeypatch):
    """The package is optional: its scan is replaced by a causal recurrence with the same contract."""

    def scan(x, dt, A, B, C, chunk_size, initial_states=None):
        """Causal scan y_i = C_i . h_i: the shifted form, read one token later from a padded sequence."""
        x, dt, B, C = (torch.cat([t, torch.zeros_like(t[:, :1])], 1) for t in (x, dt, B, C))
        y = mix_recurrence(x, dt, torch.zeros_like(dt), A, B, C, torch.zeros_like(B), torch.zeros_like(C))
        return shift_tokens(y, 1)[:, :-1]

    module = types.ModuleType('mamba_ssm.ops.triton.ssd_combined')
    module.mamba_chunk_scan_combined = scan
    for name in ('mamba_ssm', 'mamba_ssm.ops', 'mamba_ssm.ops.triton'):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, 'mamba_ssm.ops.triton.ssd_combined', module)
    from hydra_vision.ops.mamba_ssm import mix_mamba_ssm

    inputs = mix_inputs(L=9, G=2)
    inputs['A'] = inputs['A'].float()
    torch.testing.assert_close(mix_mamba_ssm(**inputs), mix_recurrence(**inputs), rtol=1e-6, atol=1e-6)
