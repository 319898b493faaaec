"""Time and memory of one mixer at one length."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
from torch import Tensor, nn

from hydra_vision import mixers
from hydra_vision.bench.memory import allocated, peak_above
from hydra_vision.bench.models import OUT_OF_MEMORY
from hydra_vision.bench.timing import Timing, measure

__all__ = ['ATTENTIONS', 'PASSES', 'Point', 'grid_of', 'make_mixer', 'measure_length', 'variants']

UNFUSED, FUSED = 'attention, unfused', 'attention, SDPA'
ATTENTIONS = (UNFUSED, FUSED)  # timm's block, as it stands in a ViT of the same width
PASSES = {'infer': 'forward', 'train': 'forward+backward'}


@dataclass(frozen=True)
class Point:
    """One mixer at one length, on ``batch`` sequences; without a timing where it was not run to the end."""

    mixer: str
    length: int
    batch: int
    mode: str
    timing: Optional[Timing] = None
    peak_bytes: Optional[int] = None
    status: str = 'ok'

    @property
    def seconds_per_token(self) -> Optional[float]:
        return None if self.timing is None else self.timing.median / (self.batch * self.length)

    def csv(self, run: dict[str, Any]) -> dict[str, Any]:
        """One row of points.csv; ``run`` holds what is the same in every row."""
        timing = self.timing
        return {
            'mixer': self.mixer,
            'L': self.length,
            'batch': self.batch,
            'passes': PASSES[self.mode],
            **run,
            'status': self.status,
            'median_ms': None if timing is None else round(timing.median * 1e3, 5),
            'p10_ms': None if timing is None else round(timing.p10 * 1e3, 5),
            'p90_ms': None if timing is None else round(timing.p90 * 1e3, 5),
            'ns_per_token': None if timing is None else round(self.seconds_per_token * 1e9, 4),
            'peak_memory_gib': None if self.peak_bytes is None else round(self.peak_bytes / 2**30, 5),
        }


def variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every mixer of the family by the name in tables: its registered name and arguments."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in mixers.list():
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

    What does not fit beside the others is tried again alone before it counts as out of memory.

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
    points: dict[str, Point] = {}
    steps: dict[str, Callable[[], object]] = {}

    def build(name: str) -> None:
        before = allocated(device)
        try:
            step = _step(make_mixer(name, d_model, length, device), u, mode, dtype)
            step()  # compiles kernels, allocates workspaces
            points[name] = Point(name, length, batch, mode, peak_bytes=peak_above(step, device, before))
            steps[name] = step
        except torch.OutOfMemoryError:
            points[name] = Point(name, length, batch, mode, status=OUT_OF_MEMORY)

    def run() -> None:
        try:
            timings = measure(steps, device, rounds=rounds, time_limit=0.0, warmup=1, burst=burst)
        except torch.OutOfMemoryError:  # one of them, beside the others
            for name in steps:
                points[name] = replace(points[name], peak_bytes=None, status=OUT_OF_MEMORY)
        else:
            for name, timing in timings.items():
                points[name] = replace(points[name], timing=timing)
        steps.clear()
        _release(device)

    for name in names:
        build(name)
        if name not in steps:
            _release(device)
    run()
    for name in [name for name in names if points[name].status == OUT_OF_MEMORY]:
        build(name)
        run()
    return [points[name] for name in names]


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()
