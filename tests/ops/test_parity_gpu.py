"""Other projects' kernels on the same arguments, on a CUDA device: forward and every gradient."""

import os

import pytest
import torch
from triton_checks import MIX_NAMES, check_errors, mix_arguments, value_and_grads

from hydra_vision.ops import quasiseparable_mix
from hydra_vision.ops.mamba_ssm import mix_mamba_ssm
from hydra_vision.ops.reference import mix_dense

pytestmark = pytest.mark.gpu
# One configuration a kernel of mamba_ssm instead of minutes of autotuning; read when it is first imported.
os.environ.setdefault('MAMBA_DETERMINISTIC', '1')


def check_parity(theirs, sizes: tuple, dtype: torch.dtype, tolerance: float, **options) -> None:
    """Ours is as close to theirs as ``tolerance``, and no further from float64 than twice theirs, over many seeds."""
    runs, distances = [], {}
    for seed in range(16):  # the gradient of A is four numbers, and a few of them a chance
        cast = [None if t is None else t.cuda() for t in mix_arguments(*sizes, seed=seed, **options)]
        for k in (0, 4, 5, 6, 7):
            cast[k] = cast[k].to(dtype)
        ours = value_and_grads(lambda a: quasiseparable_mix(*a[:9], init_states=a[9], backend='triton'), cast)
        other = value_and_grads(theirs, cast)
        exact = value_and_grads(lambda a: mix_dense(*a), [None if t is None else t.double() for t in cast])
        runs.append((exact, other, ours))
        names = ['y', *(n for n, t in zip(MIX_NAMES, cast) if t is not None)]
        for name, a, b, reference in zip(names, ours, other, exact):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
            distances.setdefault(name, []).append(float((a.double() - b.double()).norm() / reference.norm()))
    means = {name: sum(values) / len(values) for name, values in distances.items()}
    assert max(means.values()) < tolerance, means
    check_errors(names, runs, dtype)


@pytest.mark.parametrize(('L', 'G', 'chunk_size', 'init_states'), [(196, 1, 256, False), (300, 2, 64, True)])
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float32, 1e-2), (torch.bfloat16, 3e-2)], ids=str)
def test_mamba_ssm(L, G, chunk_size, init_states, dtype, tolerance):
    """float32 as well, where their products are in TF32."""
    pytest.importorskip('mamba_ssm.ops.triton.ssd_combined', exc_type=ImportError)
    sizes = (2, L, 4, 64, G, 64)
    check_parity(lambda a: mix_mamba_ssm(*a, chunk_size=chunk_size), sizes, dtype, tolerance, init_states=init_states)


def test_mamba_ssm_is_a_backend():
    pytest.importorskip('mamba_ssm.ops.triton.ssd_combined', exc_type=ImportError)
    arguments = [None if t is None else t.cuda() for t in mix_arguments(1, 100, 2, 64, 1, 64)]
    y = quasiseparable_mix(*arguments[:9], backend='mamba_ssm')
    assert torch.equal(y, mix_mamba_ssm(*arguments))


@pytest.mark.parametrize('L', [196, 300])
def test_flash_linear_attention(L):
    pytest.importorskip('fla.ops.simple_gla', exc_type=ImportError)
    from benchmarks.operators import mix_simple_gla

    check_parity(lambda a: mix_simple_gla(*a[:9]), (2, L, 4, 64, 2, 64), torch.bfloat16, 3e-2)
