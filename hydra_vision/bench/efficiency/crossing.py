"""Efficiency length: where a mixer's cost curve crosses that of attention, measured and fitted.

The measure is that of the Comprehensive Attention Benchmark (Zhang et al., ICML 2023, https://arxiv.org/abs/2210.07661).
Its published script reads the clock without waiting for the device and never resets the peak memory between two points;
here each point is synchronised and starts from a fresh peak (``bench/timing.py``, ``bench/memory.py``).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Optional

__all__ = ['Crossing', 'Fit', 'find_crossing', 'fit_power_law', 'fitted_crossing']

Kind = Literal['always', 'at', 'none in range', 'not measured']
FITTED_POINTS = 4  # the longest ones: below, constant costs hide the growth
_REACH = 16  # a fit says nothing about lengths many times longer than the longest one measured


@dataclass(frozen=True)
class Crossing:
    """From where on a mixer costs less than attention.

    Attributes:
        kind: 'always': at every length; 'at': from ``length`` on; 'none in range': not at the longest one;
            'not measured': no length at which both have a result.
        length: Tokens, for 'at'.
    """

    kind: Kind
    length: Optional[float] = None

    def __str__(self) -> str:
        return self.kind if self.length is None else f'{self.length:.0f}'


@dataclass(frozen=True)
class Fit:
    """cost = factor * L ** exponent, by least squares on logarithms."""

    factor: float
    exponent: float


def find_crossing(mixer: Mapping[int, Optional[float]], attention: Mapping[int, Optional[float]]) -> Crossing:
    """The measured crossing: the mixer is cheaper there and at every longer length that was measured.

    Between the last length at which attention is cheaper and the next one, both curves are straight lines on
    logarithmic axes. Running out of memory costs more than any result.

    Args:
        mixer: Length -> cost; None where it ran out of memory. Lengths that are missing were not measured.
        attention: The same.
    """
    lengths = sorted(n for n in mixer.keys() & attention.keys() if mixer[n] is not None or attention[n] is not None)
    if not lengths:
        return Crossing('not measured')

    def gap(n: int) -> float:
        ours, theirs = mixer[n], attention[n]
        if ours is None:
            return math.inf
        return -math.inf if theirs is None else math.log(ours) - math.log(theirs)

    dearer = [n for n in lengths if gap(n) > 0]
    if not dearer:
        return Crossing('always')
    if dearer[-1] == lengths[-1]:
        return Crossing('none in range')
    below, above = dearer[-1], lengths[lengths.index(dearer[-1]) + 1]
    if math.isinf(gap(below)) or math.isinf(gap(above)):
        return Crossing('at', float(above))
    share = gap(below) / (gap(below) - gap(above))
    return Crossing('at', math.exp(math.log(below) + share * (math.log(above) - math.log(below))))


def fit_power_law(costs: Mapping[int, Optional[float]]) -> Optional[Fit]:
    """The power law through the longest ``FITTED_POINTS`` lengths with a result; None with fewer than two."""
    points = [(math.log(n), math.log(cost)) for n, cost in sorted(costs.items()) if cost is not None][-FITTED_POINTS:]
    if len(points) < 2:
        return None
    x = _mean([a for a, _ in points])
    y = _mean([b for _, b in points])
    exponent = sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)
    return Fit(math.exp(y - exponent * x), exponent)


def fitted_crossing(mixer: Optional[Fit], attention: Optional[Fit], longest: int) -> Optional[float]:
    """Where the fitted laws meet, up to 16 times the longest length measured.

    None where they do not, or where the mixer does not grow slower than attention.
    """
    if mixer is None or attention is None or mixer.exponent >= attention.exponent:
        return None
    where = (math.log(mixer.factor) - math.log(attention.factor)) / (attention.exponent - mixer.exponent)
    return math.exp(where) if where <= math.log(_REACH * longest) else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
