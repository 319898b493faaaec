"""Sizes, dtypes and launch parameters of one call, worked out once on the host."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Optional

import torch
from torch import Tensor

from .table import Launch, launch_for

__all__ = ['SIZES', 'Plan', 'alignment', 'architecture', 'fast_math', 'forced_launch', 'launch_is_forced', 'make_plan']

SIZES = (16, 32, 64, 128)
ARCH_WITHOUT_DEVICE = 90  # whose launch table is used for tensors that are not on a GPU
INTERPRETED = Launch(16)  # small tiles: the interpreter's time goes with the work on padding
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Plan:
    """B, L, H, P, G, N and what follows from them."""

    B: int
    L: int
    H: int
    P: int
    G: int
    N: int
    dtype: torch.dtype
    device: torch.device
    launch: Launch

    @cached_property
    def T(self) -> int:
        """Tokens a tile."""
        return self.launch.tile

    @cached_property
    def nT(self) -> int:
        """Tiles a sequence."""
        return -(-self.L // self.T)

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Launches of a kernel that does a tile a program: (tiles, rows of each); fewer rows than T: the last tile."""
        left = self.L - (self.nT - 1) * self.T
        rows = next((size for size in (16, 32) if left <= size < self.T), self.T)
        if rows == self.T or not 0 < self.launch.tail <= self.B * self.H:
            return ((self.nT, self.T),)
        return ((self.nT - 1, self.T), (1, rows)) if self.nT > 1 else ((1, rows),)

    @cached_property
    def Lp(self) -> int:
        """Tokens including padding."""
        return self.nT * self.T

    @cached_property
    def precision(self) -> str:
        """Of float32 operands in matrix products: exact for float32 input; float16's wide ones need more than tf32."""
        if self.dtype == torch.float32:
            return 'ieee'
        return 'tf32x3' if max(self.P, self.N) < 128 else 'tf32'  # for want of shared memory on consumer cards

    @cached_property
    def sums(self) -> torch.dtype:
        """Of cumulative decays."""
        return torch.float64 if self.dtype == torch.float32 else torch.float32

    @cached_property
    def exact(self) -> bool:
        """Neighbours, whose pair no decay touches, left out of the decays' sums: it matters beyond half precision."""
        return self.dtype == torch.float32

    @cached_property
    def planes(self) -> int:
        """Of the backward's sums of G = dM o M, (planes, B, H, Lp), a forward and a backward one each:

        0 1 rows and 2 3 columns of the tile on the diagonal; 4 5 rows and 6 7 columns of everything else; where
        ``exact`` leaves neighbours out of 2 3, 8 9 are the columns with them.
        """
        return 10 if self.exact else 8

    @cached_property
    def wide(self) -> torch.dtype:
        """Of states, of scores and of their gradient: bfloat16 has the range for them, float16 has not."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32

    @cached_property
    def keeps_norm(self) -> bool:
        """Whether the gated norm's input can be had back from its output (norm.py): float16 lacks the range."""
        return self.dtype != torch.float16

    def options(self, kernel: str, rows: Optional[int] = None) -> dict[str, int]:
        """num_warps and num_stages; ``rows`` of a tile, where they are those of one of the ``spans``."""
        return self.launch.options(kernel, tail=rows not in (None, self.T))

    def heads(self, kernel: str, rows: int) -> int:
        """Heads a program; a launch over the last tile alone has too few programs unless they share the heads."""
        return self.launch.heads_of(kernel, self.H // self.G, tail=rows != self.T)

    def tiles(self, dtype: torch.dtype) -> Tensor:
        """(B, G, nT, T, T), uninitialised."""
        return torch.empty(self.B, self.G, self.nT, self.T, self.T, dtype=dtype, device=self.device)

    def states(self) -> Tensor:
        """(B, H, 2, nT, N, P), uninitialised."""
        return torch.empty(self.B, self.H, 2, self.nT, self.N, self.P, dtype=self.wide, device=self.device)


_forced: Optional[Launch] = None


@contextmanager
def forced_launch(launch: Launch) -> Iterator[None]:
    """Use ``launch`` for every problem inside the block: for tests of each configuration, and for tuning."""
    global _forced
    before, _forced = _forced, launch
    try:
        yield
    finally:
        _forced = before


def launch_is_forced() -> bool:
    """Whether the block that is running is inside ``forced_launch``."""
    return _forced is not None


def fast_math(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether instructions as precise as bfloat16 do; the interpreter, on the CPU, has none of them."""
    return dtype == torch.bfloat16 and device.type != 'cpu'


def make_plan(B: int, L: int, H: int, P: int, G: int, N: int, like: Tensor, launch: Optional[Launch] = None) -> Plan:
    """Check what only these kernels limit, and look the launch parameters up.

    Raises:
        ValueError: headdim or d_state that has no kernel, or a sequence that is too long.
        TypeError: a dtype that has no kernel.
    """
    interpreted = os.environ.get('TRITON_INTERPRET') == '1'
    launch = launch or _forced
    plan = _plan if launch is None else _plan.__wrapped__  # launches are not hashable
    return plan(B, L, H, P, G, N, like.dtype, like.device, launch, architecture(like.device), interpreted)


def architecture(device: torch.device) -> int:
    """Compute capability times ten; of a device that is no GPU, that whose launch table is used."""
    return _capability(device) if device.type == 'cuda' else ARCH_WITHOUT_DEVICE


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache(maxsize=1024)
def _plan(
    B: int, L: int, H: int, P: int, G: int, N: int, dtype: torch.dtype, device: torch.device, launch: Optional[Launch],
    arch: int, interpreted: bool,
) -> Plan:  # fmt: skip
    """One plan a problem: a call asks for it several times, and small models are bound by the host."""
    for name, value in (('headdim P', P), ('d_state N', N)):
        if value not in SIZES:
            raise ValueError(f"{name} = {value}; backend 'triton' has kernels for {SIZES}; backend 'chunked' takes any")
    if dtype not in DTYPES:
        raise TypeError(f"dtype {dtype}; backend 'triton' has kernels for {DTYPES}; backend 'chunked' takes any")
    if not 1 <= L <= 65536:
        raise ValueError(f"L = {L}; backend 'triton' takes 1 <= L <= 65536")
    if launch is None:
        launch = INTERPRETED if interpreted else launch_for(arch, L, P, N, str(dtype).removeprefix('torch.'))
    return Plan(B, L, H, P, G, N, dtype, device, launch)


def alignment(t: Tensor, *strides: int) -> int:
    """Elements by which every row start of ``t`` is aligned, at most 16 bytes."""
    size = t.element_size()
    limit = 16 // size
    while limit > 1 and (t.data_ptr() % (limit * size) or any(s % limit for s in strides)):
        limit //= 2
    return limit
