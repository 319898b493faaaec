"""The eager LayerNorm kernel: on the GPU, or in Triton's interpreter (see test_triton_interpreter.py)."""

import os

import pytest
import torch
import torch.nn.functional as F
from triton_checks import value_and_grads

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = 'cpu' if INTERPRETED else 'cuda'
HALF = torch.float16 if INTERPRETED else torch.bfloat16
SHAPES = [(3, 5, 16), (2, 9, 24), (1, 1, 64), (5, 7, 192), (0, 3, 8)]
if not INTERPRETED:
    SHAPES += [(7, 196, 768), (2, 33, 1024), (2, 3, 4096), (64, 196, 128)]


def arguments(shape, x_dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) * 2 + 1).to(x_dtype)
    weight, bias = (torch.randn(shape[-1], generator=generator) for _ in range(2))
    return [t.to(DEVICE) for t in (x, weight, bias)]


@pytest.mark.parametrize('programs', [2, 792])  # many rows a program, or few
@pytest.mark.parametrize('x_dtype', [torch.float32, HALF], ids=str)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_every_gradient_against_float64(monkeypatch, shape, x_dtype, programs):
    from hydra_vision.ops.triton import layernorm

    monkeypatch.setattr(layernorm, 'PROGRAMS', programs)
    tensors = arguments(shape, x_dtype)
    ours = value_and_grads(lambda a: layernorm.layer_norm(*a, 1e-6, HALF), tensors)
    double = [t.double() for t in tensors]
    exact = value_and_grads(lambda a: F.layer_norm(a[0], shape[-1:], a[1], a[2], 1e-6).to(HALF).double(), double)
    exact[0] = F.layer_norm(double[0], shape[-1:], double[1], double[2], 1e-6)
    # value_and_grads draws its output gradient in the dtype of the output: the same numbers for both in half precision
    assert [t.dtype for t in ours] == [HALF, x_dtype, torch.float32, torch.float32]
    for k, (found, expected) in enumerate(zip(ours, exact)):
        rounding = torch.finfo(HALF).eps if k == 0 or (x_dtype == HALF and k == 1) else 1e-6
        assert float((found.double() - expected).norm()) <= max(rounding * float(expected.norm()), 1e-7)


def test_transposed_input():
    from hydra_vision.ops.triton.layernorm import layer_norm

    x, weight, bias = arguments((2, 9, 24), torch.float32)
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
    y, grad, *_ = value_and_grads(lambda a: layer_norm(*a, 1e-6, HALF), [transposed, weight, bias])
    expected = value_and_grads(lambda a: layer_norm(*a, 1e-6, HALF), [x, weight, bias])
    assert torch.equal(y, expected[0])
    assert torch.equal(grad, expected[1])


def test_saved_tensors_given_back_in_another_layout():
    from hydra_vision.ops.triton.layernorm import layer_norm

    def other_layout(t):
        return t.transpose(0, 1).contiguous().transpose(0, 1) if t.ndim > 1 else t

    tensors = arguments((2, 9, 24), torch.float32)
    expected = value_and_grads(lambda a: layer_norm(*a, 1e-6, HALF), tensors)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, other_layout):
        found = value_and_grads(lambda a: layer_norm(*a, 1e-6, HALF), tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_second_derivative_is_refused():
    from hydra_vision.ops.triton.layernorm import layer_norm

    x, weight, bias = (t.requires_grad_() for t in arguments((1, 2, 16), torch.float32))
    y = layer_norm(x, weight, bias, 1e-6, HALF)
    with pytest.raises(RuntimeError, match='second derivatives'):
        torch.autograd.grad(y.float().square().sum(), x, create_graph=True)


def test_bad_shapes_are_errors():
    from hydra_vision.ops.triton.layernorm import MAX_WIDTH, layer_norm

    x, weight, bias = arguments((1, 2, 16), torch.float32)
    with pytest.raises(ValueError, match='bias'):
        layer_norm(x, weight, bias[:4], 1e-6, HALF)
    with pytest.raises(ValueError, match=str(MAX_WIDTH)):
        layer_norm(torch.empty(1, MAX_WIDTH + 1, device=DEVICE), weight, bias, 1e-6, HALF)
