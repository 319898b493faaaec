"""Inputs for the operator tests."""

import pytest
import torch


class MixInputs(dict):
    """Arguments of ``quasiseparable_mix`` by name."""

    def to(self, dtype: torch.dtype) -> 'MixInputs':
        return MixInputs({k: None if v is None else v.to(dtype) for k, v in self.items()})

    def requires_grad_(self) -> 'MixInputs':
        return MixInputs({k: None if v is None else v.detach().clone().requires_grad_() for k, v in self.items()})


def make_mix_inputs(
    B: int = 2,
    L: int = 7,
    H: int = 4,
    P: int = 3,
    N: int = 5,
    G: int = 1,
    dt: str = 'usual',
    A: str = 'usual',
    D: str = 'token',
    init_states: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> MixInputs:
    """Random inputs. ``dt``: 'usual' [1e-3, 1], 'zero', 'large' (50), 'mixed' (0, tiny and up to 50 side by side)."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def steps() -> torch.Tensor:
        u = torch.rand(B, L, H, generator=generator, dtype=torch.float64)
        if dt == 'usual':
            return 1e-3 * 1e3**u
        if dt == 'zero':
            return torch.zeros_like(u)
        if dt == 'large':
            return torch.full_like(u, 50.0)
        kind = torch.randint(0, 3, u.shape, generator=generator)
        return torch.where(kind == 0, 0.0, torch.where(kind == 1, 1e-3 * u, 50 * u))

    decay = {'usual': -(0.5 + torch.arange(H) / H), 'weak': torch.full((H,), -1e-4), 'strong': torch.full((H,), -50.0)}
    inputs = MixInputs(
        x=randn(B, L, H, P),
        dt_f=steps(),
        dt_b=steps(),
        A=decay[A].double(),
        B_f=randn(B, L, G, N),
        C_f=randn(B, L, G, N),
        B_b=randn(B, L, G, N),
        C_b=randn(B, L, G, N),
        D={'token': randn(B, L, H), 'head': randn(H), 'none': None}[D],
        init_states=randn(H, P, N) if init_states else None,
    )
    return inputs.to(dtype)


@pytest.fixture
def mix_inputs():
    return make_mix_inputs
