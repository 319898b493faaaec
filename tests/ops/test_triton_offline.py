"""Compile what the launch table ships, without a GPU: registers, spills, shared memory."""

import importlib.util
import os

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='the package triton is not installed'),
    pytest.mark.skipif(os.environ.get('TRITON_INTERPRET') == '1', reason='the interpreter compiles nothing'),
]

CONSUMER_SHARED = 99 * 1024
HOPPER_SHARED = 227 * 1024
SPILL_LIMIT = 256  # bytes a thread
SLOW_SPILL_LIMIT = 10240  # rows that are right but not tuned: float16, float32, 128 columns (NOTES.md)


def compiled(arch: int, L: int, **problem):
    from hydra_vision.ops.triton.offline import compile_launch, problem_launches

    return [compile_launch(launch, arch) for launch in problem_launches(arch, L, **problem)]


def check(arch: int, results, spill_limit: int = SPILL_LIMIT) -> None:
    limit = HOPPER_SHARED if arch == 90 else CONSUMER_SHARED
    bad = [r for r in results if r.shared > limit or r.registers > 255 or r.spills > spill_limit]
    assert results
    assert not bad, bad


@pytest.mark.slow
@pytest.mark.parametrize('arch', [80, 89, 90])
@pytest.mark.parametrize('L', [49, 196])
def test_base_model(arch, L):
    check(arch, compiled(arch, L))


@pytest.mark.slow
@pytest.mark.parametrize('arch', [80, 90])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
def test_other_dtypes(arch, dtype):
    check(arch, compiled(arch, 196, dtype=dtype, H=4), SLOW_SPILL_LIMIT)


@pytest.mark.slow
@pytest.mark.parametrize(('P', 'N'), [(16, 16), (32, 128), (128, 32), (128, 128)])
def test_other_widths(P, N):
    check(80, compiled(80, 196, P=P, N=N, H=4, inner=False), SLOW_SPILL_LIMIT if 128 in (P, N) else SPILL_LIMIT)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
def test_widest_in_other_dtypes(dtype):
    check(80, compiled(80, 196, P=128, N=128, H=4, dtype=dtype, inner=False), SLOW_SPILL_LIMIT)


@pytest.mark.parametrize('arch', [80, 89, 90])
def test_layer_norm(arch):
    from hydra_vision.ops.triton.offline import compile_launch, layer_norm_launches

    for D in (192, 768, 4096):
        results = [compile_launch(launch, arch) for launch in layer_norm_launches(D)]
        check(arch, results, spill_limit=0)


def test_recording_needs_no_device():
    from hydra_vision.ops.triton.offline import problem_launches

    names = {launch.name for launch in problem_launches(90, 196)}
    assert {'conv7_kernel', 'mix_heads_kernel', 'norm_gate_kernel', 'dx_heads_kernel'} <= names
