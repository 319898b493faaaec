"""The goals this project has set itself, checked against the rows of a run that holds what they need."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import torch

from .models import Result

__all__ = ['Goal', 'Verdict', 'check_goals']


@dataclass(frozen=True)
class Goal:
    """``value(hydra) / value(other)`` against a limit.

    ``other`` is the same model at ``base_size`` where that is given, else the peer at the same size.
    """

    title: str
    model: str
    img_size: int
    batch: int
    limit: float
    at_most: bool
    strict: bool = False
    peer: Optional[str] = None
    base_size: Optional[int] = None
    base_batch: Optional[int] = None
    quantity: str = 'time'  # 'time' an image, 'token time', 'speed' in images/s, 'memory' at its peak
    device: str = 'cuda'
    mode: str = 'infer'
    compiled: bool = True
    dtype: torch.dtype = torch.bfloat16

    @property
    def sign(self) -> str:
        return {(True, False): '<=', (True, True): '<', (False, False): '>=', (False, True): '>'}[
            self.at_most, self.strict
        ]

    def met(self, value: float) -> bool:
        if value == self.limit:
            return not self.strict
        return (value < self.limit) == self.at_most


@dataclass(frozen=True)
class Verdict:
    """A goal and the ratio that was measured."""

    goal: Goal
    value: float

    @property
    def met(self) -> bool:
        return self.goal.met(self.value)


def _cpu(title: str, img_size: int, batch: int, limit: float, **kwargs) -> Goal:
    settings = {'device': 'cpu', 'compiled': False, 'dtype': torch.float32, 'at_most': True}
    return Goal(title, 'hydra_vit_tiny', img_size, batch, limit, **settings, **kwargs)


def _base_against_vit() -> list[Goal]:
    limits = ((224, 256, 1.0, 1.0), (512, 64, 1.8, 0.9), (1024, 16, 2.5, 0.8))
    pair = {'model': 'hydra_vit_base', 'peer': 'vit_base_patch16_224'}
    goals = []
    for img_size, batch, speed, memory in limits:
        where = dict(**pair, img_size=img_size, batch=batch)
        for mode in ('infer', 'train'):
            title = f'images/s, {mode}, hydra_vit_base / vit_base, {img_size} px'
            goals.append(Goal(title, **where, limit=speed, at_most=False, quantity='speed', mode=mode))
        title = f'peak memory, train, hydra_vit_base / vit_base, {img_size} px'
        goals.append(Goal(title, **where, limit=memory, at_most=True, quantity='memory', mode='train'))
    where = dict(**pair, img_size=224, batch=256, limit=0.8, at_most=False, quantity='speed', compiled=False)
    for mode in ('infer', 'train'):
        goals.append(Goal(f'images/s, {mode}, eager, hydra_vit_base / vit_base, 224 px', mode=mode, **where))
    return goals


def _smaller_against_deit() -> list[Goal]:
    goals = []
    for size in ('tiny', 'small'):
        pair = {'model': f'hydra_vit_{size}', 'peer': f'deit_{size}_patch16_224', 'img_size': 224, 'batch': 256}
        for mode in ('infer', 'train'):
            title = f'images/s, {mode}, hydra_vit_{size} / deit_{size}, 224 px'
            goals.append(Goal(title, **pair, limit=0.8, at_most=False, quantity='speed', mode=mode))
    return goals


def _linear_in_tokens() -> list[Goal]:
    where = {'model': 'hydra_vit_base', 'img_size': 2048, 'batch': 4, 'base_size': 224, 'base_batch': 256}
    goals = []
    for mode in ('infer', 'train'):
        title = f'time a token, {mode}, hydra_vit_base at 2048 px / at 224 px'
        goals.append(Goal(title, **where, limit=1.15, at_most=True, quantity='token time', mode=mode))
    return goals


GOALS: tuple[Goal, ...] = (
    _cpu('(a) time, hydra_vit_tiny / deit_tiny, 224 px, batch 8', 224, 8, 1.5, peer='deit_tiny_patch16_224'),
    _cpu('(b) time, hydra_vit_tiny at 896 px / at 448 px (4 x the tokens)', 896, 1, 4.6, base_size=448, base_batch=1),
    _cpu(
        '(c) time, hydra_vit_tiny / deit_tiny, 1024 px, batch 1',
        1024,
        1,
        1.0,
        peer='deit_tiny_patch16_224',
        strict=True,
    ),
    *_base_against_vit(),
    *_smaller_against_deit(),
    *_linear_in_tokens(),
)


def check_goals(results: Sequence[Result], device: torch.device) -> list[Verdict]:
    """Verdicts on the goals whose rows this run has. The Hydra model counts with the backend it runs by default."""
    verdicts = []
    for goal in GOALS:
        if goal.device != device.type:
            continue
        ours = _find(results, goal, goal.model, goal.img_size, goal.batch)
        if goal.base_size is None:
            other = _find(results, goal, goal.peer, goal.img_size, goal.batch)
        else:
            other = _find(results, goal, goal.model, goal.base_size, goal.base_batch)
        values = [None if result is None else _quantity(result, goal.quantity) for result in (ours, other)]
        if None not in values:
            verdicts.append(Verdict(goal, values[0] / values[1]))
    return verdicts


def _find(results: Sequence[Result], goal: Goal, model: str, img_size: int, batch: int) -> Optional[Result]:
    for result in results:
        case = result.case
        same_place = (case.model, case.img_size, case.batch) == (model, img_size, batch)
        same_way = (case.mode, case.compiled, case.dtype) == (goal.mode, goal.compiled, goal.dtype)
        if same_place and same_way and case.backend in (None, 'auto'):
            return result
    return None


def _quantity(result: Result, quantity: str) -> Optional[float]:
    if result.timing is None:
        return None
    if quantity == 'memory':
        return result.peak_bytes
    if quantity == 'speed':
        return result.images_per_second
    if quantity == 'token time':
        return result.seconds_per_image / (result.case.img_size // 16) ** 2
    return result.seconds_per_image
