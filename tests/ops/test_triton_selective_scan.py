"""The selective scan's kernels: on the GPU, or in Triton's interpreter (see test_triton_interpreter.py)."""

import os

import pytest
import torch
import torch.nn.functional as F
from triton_checks import value_and_grads

from hydra_vision.ops.selective_scan import selective_scan

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = 'cpu' if INTERPRETED else 'cuda'
# B, L, E, N, reverse, D and bias
CASES = [(2, 11, 5, 3, False, True), (1, 3, 33, 16, True, True), (1, 1, 4, 32, False, False)]
if not INTERPRETED:
    CASES += [(3, L, 96, 16, reverse, True) for L in (7, 49, 65, 197, 1025) for reverse in (False, True)]
    CASES += [(2, 50, 40, N, True, False) for N in (1, 10, 64, 256)] + [(0, 7, 32, 16, False, True)]


def arguments(B, L, E, N, rest, dtype=torch.float32, seed=0):
    """x, dt, B and C of ``dtype``, all but dt slices of wider rows."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    x, columns = normal(B, L, 2 * E)[..., :E].to(dtype), normal(B, L, 3 + 2 * N).to(dtype)
    A = -3 * torch.rand(E, N, generator=generator).to(DEVICE) - 0.05
    rest = [normal(E), normal(E)] if rest else [None, None]
    return [x, (normal(B, L, E) - 1).to(dtype), A, columns[..., 3 : 3 + N], columns[..., 3 + N :], *rest]


def double(tensors):
    return [None if t is None else t.double() for t in tensors]


def run(tensors, backend, reverse=False, softplus=True):
    return value_and_grads(lambda a: selective_scan(*a, softplus=softplus, reverse=reverse, backend=backend), tensors)


@pytest.mark.parametrize(('B', 'L', 'E', 'N', 'reverse', 'rest'), CASES)
def test_against_float64(B, L, E, N, reverse, rest):
    tensors = arguments(B, L, E, N, rest)
    for f, e in zip(run(tensors, 'triton', reverse), run(double(tensors), 'chunked', reverse)):
        scale = float(e.abs().max()) if e.numel() else 0.0
        torch.testing.assert_close(f.double(), e, rtol=1e-4, atol=2e-5 * max(scale, 0.1))
    # x, B and C as slices of wider rows, and without what the backward pass needs
    y = selective_scan(*tensors, softplus=True, reverse=reverse, backend='triton')
    assert torch.equal(y, run(tensors, 'triton', reverse)[0])


def test_half_precision():
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    tensors = arguments(*((1, 9, 6, 4) if INTERPRETED else (4, 197, 192, 16)), True, dtype)
    found, expected = run(tensors, 'triton'), run(double(tensors), 'chunked')
    assert [f.dtype for f in found] == [dtype, *(t.dtype for t in tensors)]
    for f, e in zip(found, expected):
        assert float((f.double() - e).norm() / e.norm()) < 4 * torch.finfo(dtype).eps


def test_step_sizes_that_are_ready():
    tensors = arguments(1, 5, 4, 2, False)
    tensors[1] = tensors[1].abs()
    for f, e in zip(run(tensors, 'triton', softplus=False), run(double(tensors), 'chunked', softplus=False)):
        torch.testing.assert_close(f.double(), e, rtol=1e-4, atol=1e-5)


def test_more_states_than_there_are_registers_for():
    with pytest.raises(ValueError, match="backend 'triton' takes N <= 256"):
        run(arguments(1, 2, 1, 257, False), 'triton')


@pytest.mark.parametrize(('shape', 'K', 'reverse', 'bias'), [
    ((2, 9, 5), 4, False, True),
    ((1, 5, 3), 2, True, False),
    *([] if INTERPRETED else [((3, 197, 384), 4, reverse, True) for reverse in (False, True)]),
])  # fmt: skip
def test_causal_convolution(shape, K, reverse, bias):
    from hydra_vision.mixers.base import causal_conv
    from hydra_vision.ops.triton.causal_conv import causal_conv_silu

    torch.manual_seed(0)
    tensors = [torch.randn(shape), torch.randn(shape[2], 1, K), torch.randn(shape[2]) if bias else None]
    tensors = [None if t is None else t.to(DEVICE) for t in tensors]
    found = value_and_grads(lambda a: causal_conv_silu(*a, reverse), tensors)
    expected = value_and_grads(
        lambda a: F.silu(causal_conv(*a, reverse)),
        double(tensors),
    )
    for f, e in zip(found, expected):
        torch.testing.assert_close(f.double(), e, rtol=1e-4, atol=1e-4)
