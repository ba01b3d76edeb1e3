"""Means over seeds, their intervals, and how many seeds would show a difference."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from statistics import fmean, stdev

MOST_SEEDS = 10_000


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return the mean and half the width of Student's interval for it.

    The half width is NaN for a single value.
    """
    if len(values) < 2:
        return fmean(values), math.nan
    spread = stdev(values) / math.sqrt(len(values))
    return fmean(values), t_quantile((1 + level) / 2, len(values) - 1) * spread


def seeds_needed(
    differences: Sequence[float], level: float = 0.95, power: float = 0.8
) -> int | None:
    """Return how many seeds a paired t-test needs to show a difference of this size.

    Args:
        differences: of two networks, seed by seed; at least two.
        level: of the two-sided test.
        power: chance that the test shows a difference as large as their mean.

    Returns:
        The number, or None above 10,000.
    """
    effect, spread = abs(fmean(differences)), stdev(differences)

    def enough(seeds: int) -> bool:
        needed = t_quantile((1 + level) / 2, seeds - 1) + t_quantile(power, seeds - 1)
        return effect * math.sqrt(seeds) >= needed * spread

    if not enough(MOST_SEEDS):
        return None
    below, above = 1, MOST_SEEDS
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (below, middle) if enough(middle) else (middle, above)
    return above


@functools.lru_cache
def t_quantile(probability: float, freedom: int) -> float:
    """Return a quantile of Student's distribution.

    Args:
        probability: from 0.5 to below 1.
        freedom: degrees of freedom, 1 or more.
    """
    low, high = 0.0, 1.0
    while _t_distribution(high, freedom) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if _t_distribution(middle, freedom) < probability else (low, middle)
        )
    return high


def _t_distribution(t: float, freedom: int) -> float:
    """Return P(T <= t) for t >= 0, by finite sums (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for number in range(1 + odd, freedom, 2):
        total += term
        term *= cosine * cosine * number / (number + 1)
    central = math.sin(angle) * total
    return 0.5 + (angle + central) / math.pi if odd else 0.5 + central / 2
