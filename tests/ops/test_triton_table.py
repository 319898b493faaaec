"""Every configuration that the launch table ships, run on the GPU at hand, whatever architecture its row is for."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from triton_checks import check_inner, check_mix

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='the package triton is not installed'),
]


def rows():
    """Distinct (launch, P, N, dtype) of the table, each with the longest bucket that uses it."""
    if importlib.util.find_spec('triton') is None:
        return []
    from hydra_vision.ops.triton.table import shipped

    found = {}
    for (arch, limit, P, N, dtype), launch in sorted(shipped().items(), key=lambda item: item[0][:2]):
        label = f'sm_{arch}, L to {limit}, P {P}, N {N}, {dtype}'
        found[repr(launch), P, N, dtype] = pytest.param(launch, limit, P, N, getattr(torch, dtype), id=label)
    return list(found.values())


@pytest.mark.parametrize(('launch', 'limit', 'P', 'N', 'dtype'), rows())
def test_row(launch, limit, P, N, dtype):
    """24 heads, as the base model: heads a program are compile-time constants. Two tiles and a bit of a third."""
    from hydra_vision.ops.triton.plan import forced_launch

    for form in [launch, replace(launch, tail=1)] if launch.tail else [launch]:
        with forced_launch(form):
            check_mix(1, min(limit, 2 * launch.tile + 2), 24, P, 1, N, dtype, 'cuda')


@pytest.mark.parametrize(('H', 'P'), [(13, 16), (13, 64), (17, 16), (17, 32), (22, 64), (1, 16), (1, 32)])
def test_heads_that_few_numbers_divide(H, P):
    check_mix(1, 196, H, P, 1, 64, torch.bfloat16, 'cuda')


@pytest.mark.parametrize('G', [1, 2])
@pytest.mark.parametrize('L', [4, 20, 196, 212])
def test_short_last_tile(L, G):
    """4 and 20 tokens in the last tile, or in the only one, of a batch that is large enough for a launch of its own.

    One group of B and C runs in whole chunks on Hopper, two in tiles.
    """
    check_mix(24, L, 24, 64, G, 64, torch.bfloat16, 'cuda', seeds=2)
    check_inner(24, L, 24, 64, G, 64, torch.bfloat16, 'cuda', seeds=2)


@pytest.mark.parametrize('arch', [80, 89, 90])
@pytest.mark.parametrize('L', [49, 196])
def test_base_model(arch, L):
    """All kernels of the base model with every architecture's parameters."""
    from hydra_vision.ops.triton.plan import forced_launch
    from hydra_vision.ops.triton.table import launch_for

    with forced_launch(launch_for(arch, L, 64, 64, 'bfloat16')):
        check_inner(1, L, 24, 64, 1, 64, torch.bfloat16, 'cuda', seeds=2)
