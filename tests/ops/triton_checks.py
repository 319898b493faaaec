"""What the tests of the Triton kernels share: inputs, the float64 reference, and the bound that an error must keep."""

from collections.abc import Callable
from functools import partial
from typing import Any, Optional

import pytest
import torch
from torch import Tensor

from hydra_vision.ops.inner import hydra_inner as any_backend_inner
from hydra_vision.ops.reference import mix_dense
from hydra_vision.ops.triton.api import quasiseparable_mix

hydra_inner = partial(any_backend_inner, backend='triton')

MIX_NAMES = ('x', 'dt_f', 'dt_b', 'A', 'B_f', 'C_f', 'B_b', 'C_b', 'D', 'init_states')
INNER_NAMES = (
    'zxbcdt',
    'conv_weight',
    'conv_bias',
    'dt_bias',
    'A_log',
    'D',
    'fc_D_weight',
    'norm_weight',
    'init_states',
)


def mix_arguments(
    B: int,
    L: int,
    H: int,
    P: int,
    G: int,
    N: int,
    *,
    D: Optional[str] = 'token',
    init_states: bool = False,
    extreme: bool = False,
    seed: int = 0,
) -> list[Optional[Tensor]]:
    """float32 arguments of ``quasiseparable_mix`` on the CPU. extreme: dt in [0, 50], A in [-50, -1e-4]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    top = 50.0 if extreme else 0.5
    A = -torch.logspace(-4, 1.69, H) if extreme else -0.2 - uniform(H)
    diagonal = {None: None, 'head': normal(H), 'token': normal(B, L, H)}[D]
    start = normal(H, P, N) if init_states else None
    steps = [uniform(B, L, H) * top for _ in range(2)]
    if extreme:
        steps = [torch.where(uniform(B, L, H) < 0.2, torch.zeros(()), dt) for dt in steps]
    return [normal(B, L, H, P), *steps, A, *(normal(B, L, G, N) for _ in range(4)), diagonal, start]


def inner_arguments(
    B: int,
    L: int,
    H: int,
    P: int,
    G: int,
    N: int,
    *,
    K: int = 7,
    share_bc: bool = False,
    init_states: bool = False,
    bias: bool = True,
    seed: int = 0,
) -> list[Optional[Tensor]]:
    """float32 tensors of ``hydra_inner`` on the CPU, in the order of INNER_NAMES."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inner = H * P
    width = inner + (2 if share_bc else 4) * G * N
    return [
        normal(B, L, inner + width + 2 * H),
        normal(width, 1, K) / K**0.5,
        0.1 * normal(width) if bias else None,
        normal(H) - 2,
        0.3 * normal(H),
        normal(H),
        normal(H, inner) / inner**0.5,
        0.5 + torch.rand(inner, generator=generator),
        normal(H, P, N) if init_states else None,
    ]


def value_and_grads(function: Callable[..., Tensor], tensors: list[Optional[Tensor]], seed: int = 1) -> list[Tensor]:
    """[y, gradient of every tensor that is not None] for one random output gradient."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = function(leaves)
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float32).to(y.device, y.dtype)
    wanted = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(y, wanted, dy, allow_unused=True)
    return [y.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads))]


def _cast(tensors: list[Optional[Tensor]], wide: tuple[int, ...], dtype: torch.dtype, device: str) -> list:
    """Main tensors in ``dtype``; those at the indices ``wide`` stay float32."""
    return [None if t is None else t.to(device, torch.float32 if k in wide else dtype) for k, t in enumerate(tensors)]


Runs = list[tuple[list[Tensor], list[Tensor], list[Tensor]]]  # (float64, eager, ours) of each seed


def check_errors(names: list[str], runs: Runs, dtype: torch.dtype, label: str = '') -> None:
    """Every error against float64, over all seeds, is at most twice that of eager PyTorch in the same dtype.

    Several seeds, because a gradient of one number a head is a sample of a few numbers: of two equally good
    implementations one is often twice as far off by chance. Below a few units of rounding no ratio is asked for.
    """
    bad = []
    for k, name in enumerate(names):
        noise = 0.25 * torch.finfo(dtype).eps
        if dtype == torch.float32:  # a head's sum over all tokens may cancel to far less than its terms
            noise = (64 if name in ('A', 'A_log', 'dt_bias', 'D') else 8) * torch.finfo(dtype).eps
        mine_square, eager_square = 0.0, 0.0
        for exact, eager, ours in runs:
            assert torch.isfinite(ours[k]).all(), f'{label}: {name} is not finite'
            scale = float(exact[k].norm())
            if scale > 1e-12:
                mine_square += (float((ours[k].double() - exact[k]).norm()) / scale) ** 2
                eager_square += (float((eager[k].double() - exact[k]).norm()) / scale) ** 2
        mine_error, eager_error = (mine_square / len(runs)) ** 0.5, (eager_square / len(runs)) ** 0.5
        if mine_error > max(2 * eager_error, noise):
            bad.append(f'{name}: {mine_error:.2e}, eager {eager_error:.2e}')
    assert not bad, f'{label}: ' + '; '.join(bad)


SEEDS = 4


def check_mix(
    B: int, L: int, H: int, P: int, G: int, N: int, dtype: torch.dtype, device: str, seeds: int = SEEDS, **options: Any
) -> None:
    """``quasiseparable_mix`` and every gradient against the dense form in float64. options: of ``mix_arguments``."""
    runs: Runs = []
    for seed in range(seeds):
        cast = _cast(mix_arguments(B, L, H, P, G, N, seed=seed, **options), (1, 2, 3, 8, 9), dtype, device)
        exact = value_and_grads(lambda a: mix_dense(*a), [None if t is None else t.double() for t in cast])
        eager = value_and_grads(lambda a: _eager_mix(a, dtype), cast)
        runs.append((exact, eager, value_and_grads(lambda a: quasiseparable_mix(*a), cast)))
    names = ['y', *(n for n, t in zip(MIX_NAMES, cast) if t is not None)]
    check_errors(names, runs, dtype, f'L {L}, P {P}, N {N}')


def _eager_mix(a: list, dtype: torch.dtype) -> Tensor:
    """The definition in eager PyTorch: matrix products in ``dtype``, decays in float32."""
    x, dt_f, dt_b, A, B_f, C_f, B_b, C_b, D, start = a
    if dtype == torch.float32:
        return mix_dense(*a)
    from hydra_vision.ops.reference import dense_matrix

    wide = [t.float() for t in (dt_f, dt_b, A)]
    y = torch.einsum('bhij,bjhp->bihp', dense_matrix(*wide, B_f, C_f, B_b, C_b, D).to(dtype), x)
    if start is not None:
        y = y + mix_dense(torch.zeros_like(x), *wide, B_f, C_f, B_b, C_b, None, start)
    return y


def check_inner(
    B: int,
    L: int,
    H: int,
    P: int,
    G: int,
    N: int,
    dtype: torch.dtype,
    device: str,
    seeds: int = SEEDS,
    dt_limit: tuple[float, float] = (0.0, float('inf')),
    cu_seqlens: Optional[Tensor] = None,
    **options: Any,
) -> None:
    """``hydra_inner`` and every gradient against the dense form in float64. options: of ``inner_arguments``."""
    numbers = {'headdim': P, 'd_state': N, 'ngroups': G, 'dt_limit': dt_limit, 'cu_seqlens': cu_seqlens}
    numbers['share_bc'] = options.get('share_bc', False)

    def reference(a: list) -> Tensor:
        return any_backend_inner(*a[:8], init_states=a[8], backend='reference', **numbers)

    runs: Runs = []
    for seed in range(seeds):
        cast = _cast(inner_arguments(B, L, H, P, G, N, seed=seed, **options), tuple(range(1, 9)), dtype, device)
        exact = value_and_grads(reference, [None if t is None else t.double() for t in cast])
        ours = value_and_grads(lambda a: hydra_inner(*a[:8], init_states=a[8], **numbers), cast)
        runs.append((exact, value_and_grads(reference, cast), ours))
    names = ['y', *(n for n, t in zip(INNER_NAMES, cast) if t is not None)]
    check_errors(names, runs, dtype, f'L {L}')


def poison_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is full of NaN: what nobody computes nobody may read."""

    def poisoned(make):
        def fresh(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(float('nan')) if t.is_floating_point() else t

        return fresh

    for name in ('empty', 'empty_like'):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
