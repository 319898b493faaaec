"""The eager LayerNorm kernels: on the GPU, or in Triton's interpreter (see test_triton_interpreter.py)."""

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


def branch_arguments(shape, x_dtype, branch_dtype, seed=0):
    """x, branch, weight and bias; factors, of which one is zero, as drop path has it."""
    x, weight, bias = arguments(shape, x_dtype, seed)
    branch, _, _ = arguments(shape, branch_dtype, seed + 1)
    factors = torch.rand(shape[:-1], generator=torch.Generator().manual_seed(seed)) + 0.5
    factors[-1:, -1:] = 0.0
    return [x, branch, weight, bias], factors.to(DEVICE)


def rounded(t, dtype):
    """t as it is in a dtype; its gradient passes."""
    return t + (t.to(dtype).to(t.dtype) - t).detach()


@pytest.mark.parametrize('programs', [2, 792])  # many rows a program, or few
@pytest.mark.parametrize('scaled', [True, False], ids=['factors', 'plain'])
@pytest.mark.parametrize('dtypes', [(HALF, HALF), (torch.float32, HALF), (HALF, torch.float32)], ids=str)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_sum_and_norm_with_every_gradient_against_float64(monkeypatch, shape, dtypes, scaled, programs):
    from hydra_vision.ops.triton import layernorm

    monkeypatch.setattr(layernorm, 'PROGRAMS', programs)
    tensors, factors = branch_arguments(shape, *dtypes)
    wide = torch.promote_types(*dtypes)

    def ours(a):
        total, normed = layernorm.add_layer_norm(*a[:2], factors if scaled else None, *a[2:], 1e-6, HALF)
        assert (total.dtype, normed.dtype) == (wide, HALF)
        return torch.cat([total.double(), normed.double()], -1)

    def exact(a):
        total = a[0] + (a[1] * factors.double()[..., None] if scaled else a[1])
        total = rounded(total.to(wide).double(), wide)
        return torch.cat([total, F.layer_norm(total, shape[-1:], *a[2:], 1e-6).to(HALF).double()], -1)

    found, expected = value_and_grads(ours, tensors), value_and_grads(exact, [t.double() for t in tensors])
    assert [t.dtype for t in found[1:]] == [*dtypes, torch.float32, torch.float32]
    for k, (mine, theirs) in enumerate(zip(found, expected)):
        dtype = (HALF, *dtypes, wide, wide)[k]
        rounding = max(torch.finfo(dtype).eps, 1e-6)
        assert float((mine.double() - theirs).norm()) <= max(rounding * float(theirs.norm()), 1e-7), k


@pytest.mark.parametrize('dtypes', [(HALF, HALF), (torch.float32, HALF)], ids=str)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_sum_of_rows_against_float64(shape, dtypes):
    from hydra_vision.ops.triton.layernorm import add_rows

    (*tensors, _, _), factors = branch_arguments(shape, *dtypes)
    found = value_and_grads(lambda a: add_rows(*a, factors), tensors)
    double = [t.double() for t in tensors]
    expected = value_and_grads(lambda a: (a[0] + a[1] * factors.double()[..., None]).to(dtypes[0]).double(), double)
    assert [t.dtype for t in found] == [dtypes[0], *dtypes]
    for mine, theirs in zip(found, expected):
        assert float((mine.double() - theirs).norm()) <= torch.finfo(mine.dtype).eps * float(theirs.norm())


def test_one_rounding_less_than_in_two_passes():
    """The sum is no worse than the rounded product's; the norm and its gradients are those of the sum, bit for bit."""
    from hydra_vision.ops.triton.layernorm import add_layer_norm, add_rows, layer_norm

    (x, branch, weight, bias), factors = branch_arguments((4, 9, 192), HALF, HALF)
    total, normed = add_layer_norm(x, branch, factors, weight, bias, 1e-6, HALF)
    exact = x.double() + branch.double() * factors.double()[..., None]
    passes = x + (branch * factors[..., None]).to(HALF)
    assert (total.double() - exact).norm() < 0.9 * (passes.double() - exact).norm()
    assert torch.equal(total, add_rows(x, branch, factors))
    assert torch.equal(normed, layer_norm(total, weight, bias, 1e-6, HALF))

    ours = value_and_grads(lambda a: add_layer_norm(*a[:2], factors, *a[2:], 1e-6, HALF)[1], [x, branch, weight, bias])
    alone = value_and_grads(lambda a: layer_norm(*a, 1e-6, HALF), [total, weight, bias])
    assert all(torch.equal(ours[k], alone[j]) for k, j in ((0, 0), (1, 1), (3, 2), (4, 3)))


def test_gradient_of_the_sum_alone():
    from hydra_vision.ops.triton.layernorm import add_layer_norm

    tensors, factors = branch_arguments((2, 9, 24), torch.float32, torch.float32)
    _, dx, dbranch, dweight, dbias = value_and_grads(
        lambda a: add_layer_norm(*a[:2], factors, *a[2:], 1e-6, HALF)[0], tensors
    )
    torch.testing.assert_close(dbranch, dx * factors[..., None])
    assert not dweight.any()
    assert not dbias.any()
    assert dx.any()


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
    from hydra_vision.ops.triton.layernorm import add_layer_norm, add_rows, layer_norm

    def other_layout(t):
        return t.transpose(0, 1).contiguous().transpose(0, 1) if t.ndim > 1 else t

    tensors, factors = branch_arguments((2, 9, 24), torch.float32, torch.float32)
    for function in (
        lambda a: layer_norm(a[0], *a[2:], 1e-6, HALF),
        lambda a: torch.cat(add_layer_norm(*a[:2], factors, *a[2:], 1e-6, torch.float32)),
        lambda a: add_rows(*a[:2], factors),
    ):
        expected = value_and_grads(function, tensors)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, other_layout):
            found = value_and_grads(function, tensors)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_second_derivative_is_refused():
    from hydra_vision.ops.triton.layernorm import add_layer_norm, add_rows, layer_norm

    (x, branch, weight, bias), factors = branch_arguments((1, 2, 16), torch.float32, torch.float32)
    x.requires_grad_()
    for y in (
        layer_norm(x, weight, bias, 1e-6, HALF),
        add_layer_norm(x, branch, factors, weight, bias, 1e-6, HALF)[1],
        add_rows(x, branch, factors),
    ):
        with pytest.raises(RuntimeError, match='second derivatives'):
            torch.autograd.grad(y.float().square().sum(), x, create_graph=True)


def test_bad_shapes_are_errors():
    from hydra_vision.ops.triton.layernorm import MAX_WIDTH, add_layer_norm, add_rows, layer_norm

    (x, branch, weight, bias), factors = branch_arguments((1, 2, 16), torch.float32, torch.float32)
    with pytest.raises(ValueError, match=r'branch has shape \(1, 1, 16\)'):
        add_layer_norm(x, branch[:, :1], factors, weight, bias, 1e-6, HALF)
    with pytest.raises(ValueError, match=r'factors: \(1, 2\), torch.float64; it must be \(1, 2\), torch.float32'):
        add_rows(x, branch, factors.double())
    with pytest.raises(ValueError, match='bias'):
        layer_norm(x, weight, bias[:4], 1e-6, HALF)
    with pytest.raises(ValueError, match=str(MAX_WIDTH)):
        layer_norm(torch.empty(1, MAX_WIDTH + 1, device=DEVICE), weight, bias, 1e-6, HALF)
