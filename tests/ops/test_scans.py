"""One-directional scans: the semiseparable operator and Mamba's selective scan, against their definitions."""

import pytest
import torch

from hydra_vision.ops.selective_scan import choose_scan_backend, selective_scan, selective_scan_matrix
from hydra_vision.ops.semiseparable import semiseparable_matrix, semiseparable_mix

LENGTHS = [1, 2, 7, 49, 65, 197, 300]
both_directions = pytest.mark.parametrize('reverse', [False, True])


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def semiseparable_case(L: int) -> list:
    torch.manual_seed(0)
    x, dt = randn(2, L, 4, 3), torch.rand(2, L, 4, dtype=torch.float64)
    return [x, dt, -torch.rand(4, dtype=torch.float64) - 0.1, randn(2, L, 2, 5), randn(2, L, 2, 5)]


def selective_case(L: int, N: int = 4) -> list:
    torch.manual_seed(0)
    x, dt = randn(2, L, 3), 2 * torch.rand(2, L, 3, dtype=torch.float64)
    return [x, dt, -torch.rand(3, N, dtype=torch.float64), randn(2, L, N), randn(2, L, N)]


def gradients(compute, inputs):
    inputs = [t.clone().requires_grad_() for t in inputs]
    y = compute(*inputs)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), inputs)]


@both_directions
@pytest.mark.parametrize('L', LENGTHS)
def test_semiseparable_against_the_matrix(L, reverse):
    inputs = semiseparable_case(L)

    def dense(x, dt, A, B, C):
        """Entry by entry."""
        B, C = (t.repeat_interleave(2, 2) for t in (B, C))
        sums = (A * dt).cumsum(1)
        if reverse:
            sums = sums - A * dt
        exponent = sums[:, :, None] - sums[:, None, :]  # (B, i, j, H)
        seen = torch.ones(L, L, dtype=torch.bool)
        seen = seen.triu() if reverse else seen.tril()
        exponent = (-exponent if reverse else exponent).masked_fill(~seen[..., None], float('-inf'))
        M = exponent.exp() * torch.einsum('bihn,bjhn->bijh', C, B) * dt[:, None]
        return torch.einsum('bijh,bjhp->bihp', M, x)

    expected = gradients(dense, inputs)
    for backend in ('chunked', 'reference'):
        got = gradients(lambda *args, b=backend: semiseparable_mix(*args, reverse=reverse, backend=b), inputs)
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    M = semiseparable_matrix(*inputs[1:], reverse=reverse)
    torch.testing.assert_close((M @ inputs[0].transpose(1, 2)).transpose(1, 2), expected[0], rtol=1e-8, atol=1e-9)


@both_directions
@pytest.mark.parametrize('L', LENGTHS)
def test_selective_scan_against_the_recurrence(L, reverse):
    inputs = selective_case(L)
    got, expected = (
        gradients(lambda *args, b=backend: selective_scan(*args, reverse=reverse, backend=b), inputs)
        for backend in ('chunked', 'reference')
    )
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    M = selective_scan_matrix(*inputs[1:], reverse=reverse)
    torch.testing.assert_close((M @ inputs[0].mT.unsqueeze(-1)).squeeze(-1).mT, expected[0])


def test_selective_scan_gradcheck():
    inputs = [t.requires_grad_() for t in selective_case(11, N=2)]
    assert torch.autograd.gradcheck(selective_scan, inputs)


def test_long_decays_do_not_overflow():
    """Factors of exp(-sum dt A) would: 16 * 0.1 * 1024 tokens is far above the largest float32 exponent."""
    x, dt = torch.randn(1, 1024, 2), torch.full((1, 1024, 2), 0.1)
    inputs = [x, dt, torch.tensor([[-1.0, -16.0]] * 2), torch.randn(1, 1024, 2), torch.randn(1, 1024, 2)]
    got = gradients(selective_scan, inputs)
    expected = gradients(selective_scan, [t.double() for t in inputs])
    for a, b in zip(got, expected):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)


def test_selective_scan_never_holds_the_states_of_all_tokens(largest_numel):
    L, E, N = 1024, 16, 16
    x, dt = torch.randn(1, L, E, requires_grad=True), torch.rand(1, L, E)
    others = (-torch.rand(E, N), torch.randn(1, L, N), torch.randn(1, L, N))
    assert largest_numel(lambda: selective_scan(x, dt, *others).sum().backward()) < L * E * N / 8


def test_backends_of_the_selective_scan(monkeypatch):
    cpu = torch.device('cpu')
    assert choose_scan_backend('auto', cpu) == 'chunked'
    with pytest.raises(ValueError, match="unknown backend 'flash'; allowed: 'auto', 'reference', 'chunked', 'triton'"):
        choose_scan_backend('flash', cpu)
    for name in ('triton', 'mamba_ssm'):
        with pytest.raises(RuntimeError, match=f"backend '{name}'"):
            choose_scan_backend(name, cpu)
    monkeypatch.setenv('HYDRA_VISION_BACKEND', 'reference')
    assert choose_scan_backend('auto', cpu) == 'reference'
    monkeypatch.delenv('HYDRA_VISION_BACKEND')
    x, dt, A, B, C = selective_case(5)
    with pytest.raises(ValueError, match=r'C has shape \(2, 4, 4\); it must be \(2, 5, 4\)'):
        selective_scan(x, dt, A, B, C[:, :4])


@pytest.mark.parametrize('case', ['absent', 'without its scan'])
def test_a_mamba_ssm_without_its_scan_is_not_taken(case, monkeypatch, tmp_path):
    """Wheels since July 2026 import well and raise when called."""
    if case == 'without its scan':
        package = tmp_path / 'mamba_ssm' / 'ops'
        package.mkdir(parents=True)
        for folder in (package.parent, package):
            (folder / '__init__.py').touch()
        (package / 'selective_scan_interface.py').write_text('selective_scan_cuda = None\n')
        monkeypatch.syspath_prepend(tmp_path)
    message = {'absent': 'is not installed', 'without its scan': 'without selective_scan_cuda'}[case]
    if case == 'absent' and __import__('importlib').util.find_spec('mamba_ssm') is not None:
        pytest.skip('mamba_ssm is installed')
    with pytest.raises(RuntimeError, match=message):
        choose_scan_backend('mamba_ssm', torch.device('cuda'))
