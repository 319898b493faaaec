"""The goals this project has set itself, checked against the rows of a run that holds what they need."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Optional

import torch

from .models import Case, Result
from .operators import OperatorResult
from .peers import PEERS, SCANS
from .timing import Timing

__all__ = ['GOALS', 'Goal', 'OperatorGoal', 'Verdict', 'check_goals', 'check_operator_goals', 'goal_cases']


@dataclass(frozen=True)
class Limit:
    """What a ratio must not exceed, or must reach; without a limit it is only listed."""

    title: str
    limit: Optional[float]
    at_most: bool = False
    strict: bool = False

    @property
    def sign(self) -> str:
        return {(True, False): '<=', (True, True): '<', (False, False): '>=', (False, True): '>'}[
            self.at_most, self.strict
        ]

    def __str__(self) -> str:
        return '' if self.limit is None else f'{self.sign} {self.limit:g}'

    def met(self, value: float) -> Optional[bool]:
        if self.limit is None:
            return None
        if value == self.limit:
            return not self.strict
        return (value < self.limit) == self.at_most


@dataclass(frozen=True, kw_only=True)
class Goal(Limit):
    """``value(hydra) / value(other)`` against a limit.

    ``other`` is the same model at ``base_size`` where that is given, else the peer at the same size.
    """

    model: str
    img_size: int
    batch: int
    peer: Optional[str] = None
    base_size: Optional[int] = None
    base_batch: Optional[int] = None
    quantity: str = 'time'  # 'time' an image, 'token time', 'speed' in images/s, 'memory' at its peak
    device: str = 'cuda'
    mode: str = 'infer'
    compiled: bool = True
    dtype: torch.dtype = torch.bfloat16

    def cases(self) -> tuple[Case, Case]:
        """The two rows that it compares."""
        how = {'mode': self.mode, 'compiled': self.compiled, 'dtype': self.dtype}
        ours = Case(self.model, self.img_size, self.batch, backend='auto', **how)
        if self.base_size is not None:
            return ours, Case(self.model, self.base_size, self.base_batch, backend='auto', **how)
        return ours, Case(self.peer, self.img_size, self.batch, **how)


@dataclass(frozen=True, kw_only=True)
class OperatorGoal(Limit):
    """Time of the fastest of ``others`` over that of the backend 'triton', bfloat16, H 24, P 64, N 64."""

    batch: int
    length: int
    mode: str
    others: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """A goal and the ratio that was measured; its lowest and highest value over rounds measured in turns."""

    goal: Limit
    value: float
    lowest: Optional[float] = None
    highest: Optional[float] = None

    @property
    def met(self) -> Optional[bool]:
        return self.goal.met(self.value)


def _cpu(title: str, img_size: int, batch: int, limit: float, **kwargs) -> Goal:
    settings = {'device': 'cpu', 'compiled': False, 'dtype': torch.float32, 'at_most': True}
    where = {'model': 'hydra_vit_tiny', 'img_size': img_size, 'batch': batch}
    return Goal(title, limit, **where, **settings, **kwargs)


def _base_against_vit() -> list[Goal]:
    limits = ((224, 256, 1.0, 1.0), (512, 64, 1.8, 0.9), (1024, 16, 2.5, 0.8))
    pair = {'model': 'hydra_vit_base', 'peer': 'vit_base_patch16_224'}
    goals = []
    for img_size, batch, speed, memory in limits:
        where = dict(**pair, img_size=img_size, batch=batch)
        for mode in ('infer', 'train'):
            title = f'images/s, {mode}, hydra_vit_base / vit_base, {img_size} px'
            goals.append(Goal(title, speed, **where, quantity='speed', mode=mode))
        title = f'peak memory, train, hydra_vit_base / vit_base, {img_size} px'
        goals.append(Goal(title, memory, at_most=True, **where, quantity='memory', mode='train'))
    where = dict(**pair, img_size=224, batch=256, quantity='speed', compiled=False)
    for mode in ('infer', 'train'):
        goals.append(Goal(f'images/s, {mode}, eager, hydra_vit_base / vit_base, 224 px', 0.8, mode=mode, **where))
    return goals


def _smaller_against_deit() -> list[Goal]:
    goals = []
    for size in ('tiny', 'small'):
        pair = {'model': f'hydra_vit_{size}', 'peer': f'deit_{size}_patch16_224', 'img_size': 224, 'batch': 256}
        for mode in ('infer', 'train'):
            title = f'images/s, {mode}, hydra_vit_{size} / deit_{size}, 224 px'
            goals.append(Goal(title, 0.8, **pair, quantity='speed', mode=mode))
    return goals


def _linear_in_tokens() -> list[Goal]:
    goals = []
    for img_size, batch in ((512, 64), (1024, 16), (2048, 4)):
        where = {'model': 'hydra_vit_base', 'img_size': img_size, 'batch': batch, 'base_size': 224, 'base_batch': 256}
        for mode in ('infer', 'train'):
            title = f'time a token, {mode}, hydra_vit_base at {img_size} px / at 224 px'
            goals.append(Goal(title, 1.15, at_most=True, **where, quantity='token time', mode=mode))
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


# The goal is stated against times of a scan alone; against complete operators, which take longer, there is none.
OPERATOR_GOALS: tuple[OperatorGoal, ...] = tuple(
    OperatorGoal(
        f'quasiseparable_mix, {passes}, time of the {what} / ours, B {batch}, L {length}',
        limit,
        batch=batch,
        length=length,
        mode=mode,
        others=others,
    )
    for what, others, limit in (('better scan alone', SCANS, 4.0), ('better complete peer', PEERS, None))
    for batch, length in ((256, 196), (49, 1024))
    for mode, passes in (('infer', 'forward'), ('train', 'forward+backward'))
)


def goal_cases(device: torch.device) -> list[Case]:
    """Every row that a goal for this device compares, once."""
    return list(dict.fromkeys(case for goal in GOALS if goal.device == device.type for case in goal.cases()))


def check_goals(results: Sequence[Result], device: torch.device) -> list[Verdict]:
    """Verdicts on the goals whose rows this run has. The Hydra model counts with the backend it runs by default.

    Compiled is compiled, with CUDA graphs or without: both sides of a run have the same.
    """
    verdicts = []
    by_case = {replace(result.case, graphs=False): result for result in results}
    for goal in GOALS:
        if goal.device != device.type:
            continue
        ours, other = (by_case.get(case) for case in goal.cases())
        values = [None if result is None else _quantity(result, goal.quantity) for result in (ours, other)]
        if None in values:
            continue
        together = goal.quantity in ('time', 'speed') and goal.base_size is None
        rounds = _ratios(ours.timing, other.timing, goal.quantity == 'speed') if together else None
        verdicts.append(Verdict(goal, values[0] / values[1], *rounds or ()))
    return verdicts


def check_operator_goals(results: Sequence[OperatorResult], device: torch.device) -> list[Verdict]:
    """Verdicts on the operator's goals whose rows, ours and those of all that it is held against, this run has.

    The fastest of some would be an easier goal than the fastest of all.
    """
    verdicts = []
    for goal in OPERATOR_GOALS:
        timings = {}
        for result in results:
            s = result.case.shape
            same = (s.batch, s.length, s.heads, s.headdim, s.d_state) == (goal.batch, goal.length, 24, 64, 64)
            if same and result.timing and (result.case.mode, result.case.dtype) == (goal.mode, torch.bfloat16):
                timings[result.case.backend] = result.timing
        if device.type == 'cuda' and timings.keys() >= {'triton', *goal.others}:
            ours, other = timings['triton'], min((timings[name] for name in goal.others), key=lambda t: t.median)
            verdicts.append(Verdict(goal, other.median / ours.median, *_ratios(ours, other, True)))
    return verdicts


def _ratios(ours: Timing, other: Timing, speed: bool) -> tuple[float, float]:
    """Lowest and highest ratio of the times of one round, or of the speeds."""
    ratios = [b / a if speed else a / b for a, b in zip(ours.seconds, other.seconds)]
    return min(ratios), max(ratios)


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
