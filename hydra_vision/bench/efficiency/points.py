"""Time and memory of one mixer at one length."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn

from hydra_vision import mixers
from hydra_vision.bench.turns import time_in_turns

__all__ = ['ATTENTIONS', 'PASSES', 'Point', 'grid_of', 'make_mixer', 'measure_length', 'variants']

UNFUSED, FUSED = 'attention, unfused', 'attention, SDPA'
ATTENTIONS = (UNFUSED, FUSED)  # timm's block, as it stands in a ViT of the same width
PASSES = {'infer': 'forward', 'train': 'forward+backward'}
_QUANTILES = ('median', 'p10', 'p90')


@dataclass(frozen=True)
class Point:
    """One mixer at one length, on ``batch`` sequences; without times where it was not run to the end.

    Times are seconds a call, over the rounds of measuring.
    """

    mixer: str
    length: int
    batch: int
    mode: str
    median: Optional[float] = None
    p10: Optional[float] = None
    p90: Optional[float] = None
    peak_bytes: Optional[int] = None
    status: str = 'ok'

    @property
    def seconds_per_token(self) -> Optional[float]:
        return None if self.median is None else self.median / (self.batch * self.length)

    def csv(self, run: dict[str, Any]) -> dict[str, Any]:
        """One row of points.csv; ``run`` holds what is the same in every row."""
        times = {f'{name}_ms': _scaled(getattr(self, name), 1e3, 5) for name in _QUANTILES}
        return {
            'mixer': self.mixer,
            'L': self.length,
            'batch': self.batch,
            'passes': PASSES[self.mode],
            **run,
            'status': self.status,
            **times,
            'ns_per_token': _scaled(times['median_ms'], 1e6 / (self.batch * self.length), 4),
            'peak_memory_gib': _scaled(self.peak_bytes, 2**-30, 7),
        }

    @classmethod
    def from_csv(cls, row: dict[str, str]) -> 'Point':
        """The point of a row that ``csv`` made.

        Raises:
            KeyError: A column is missing.
            ValueError: A number or the kind of passes cannot be read.
        """
        times = {name: float(row[f'{name}_ms']) / 1e3 if row[f'{name}_ms'] else None for name in _QUANTILES}
        return cls(
            row['mixer'],
            int(row['L']),
            int(row['batch']),
            {passes: mode for mode, passes in PASSES.items()}[row['passes']],
            peak_bytes=round(float(row['peak_memory_gib']) * 2**30) if row['peak_memory_gib'] else None,
            status=row['status'],
            **times,
        )


def _scaled(value: Optional[float], factor: float, digits: int) -> Optional[float]:
    return None if value is None else round(value * factor, digits)


def variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every mixer of the family by the name in tables: its registered name and arguments."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in mixers.list_mixers():
        if name == 'vit_attention':  # it is what the others are compared with
            continue
        if name == 'attention':
            found['attention, family'] = (name, {})
        else:
            found[name] = (name, {})
        if 'data_dependent' in mixers.arguments(name):
            found[f'{name}, fixed'] = (name, {'data_dependent': False})
    return found


def grid_of(length: int) -> tuple[int, int]:
    """Rows and columns, as near to each other as the divisors of ``length`` allow."""
    rows = max(n for n in range(1, int(length**0.5) + 1) if length % n == 0)
    return rows, length // rows


def make_mixer(variant: str, d_model: int, length: int, device: torch.device) -> nn.Module:
    """A mixer of ``variants`` or one of ``ATTENTIONS`` for so many tokens."""
    if variant in ATTENTIONS:
        mixer = mixers.create('vit_attention', d_model, device=device)
        mixer.fused_attn = variant == FUSED
        return mixer
    name, kwargs = variants()[variant]
    if mixers.needs_grid(name, **kwargs):
        kwargs = {**kwargs, 'grid_size': grid_of(length)}
    return mixers.create(name, d_model, device=device, **kwargs)


def _step(mixer: nn.Module, u: Tensor, mode: str, dtype: torch.dtype) -> Callable[[], object]:
    device = u.device

    def forward() -> Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return mixer(u)

    if mode == 'infer':

        def infer() -> Tensor:
            with torch.no_grad():
                return forward()

        return infer

    inputs = [u, *mixer.parameters()]
    with torch.no_grad():
        gradient = torch.randn_like(forward())

    def train() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), inputs, gradient)

    return train


def measure_length(
    names: Sequence[str],
    length: int,
    mode: str,
    device: torch.device,
    *,
    tokens: int,
    d_model: int,
    dtype: torch.dtype,
    rounds: int,
    burst: float,
) -> list[Point]:
    """Time the mixers at one length in turns, and take each one's peak memory from a fresh start.

    What does not fit or fails beside the others is tried again alone before it counts as out of memory or failed.

    Args:
        names: Of ``variants`` and ``ATTENTIONS``.
        length: Tokens of a sequence.
        mode: 'infer' (forward) or 'train' (forward and backward to tokens and parameters).
        device: Where to run.
        tokens: Of a call, over all its sequences; one sequence at least.
        d_model: Width.
        dtype: Of the computation; weights are float32, another one means autocast.
        rounds: Rounds of timing.
        burst: Seconds that a burst of calls lasts at least.
    """
    batch = max(1, tokens // length)
    u = torch.randn(batch, length, d_model, device=device, requires_grad=mode == 'train')

    def build(name: str) -> Callable[[], object]:
        return _step(make_mixer(name, d_model, length, device), u, mode, dtype)

    points = []
    for name, found in time_in_turns(names, build, device, rounds=rounds, time_limit=math.inf, burst=burst).items():
        timing = found.timing
        times = {} if timing is None else {quantile: getattr(timing, quantile) for quantile in _QUANTILES}
        peak = None if timing is None else found.peak_bytes
        points.append(Point(name, length, batch, mode, peak_bytes=peak, status=found.status, **times))
    return points
