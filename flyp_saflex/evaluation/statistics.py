"""Statistics over seeds: mean, spread, paired differences.

`report` and experiment scripts import these, so that every published number is computed in one place.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from scipy.special import stdtrit

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean and spread of n values.

    Attributes:
        mean: their mean.
        deviation: sample standard deviation (n - 1); None for a single value.
        n: how many there are.
    """

    mean: float
    deviation: float | None
    n: int

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None for a single value."""
        return None if self.deviation is None else self.deviation / math.sqrt(self.n)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean difference and its t-interval.

    Attributes:
        mean: mean of the differences.
        low: lower end; None for a single pair.
        high: upper end; None for a single pair.
        n: number of pairs.
    """

    mean: float
    low: float | None
    high: float | None
    n: int


def summarise(values: Iterable[float]) -> Summary:
    """Return mean, sample standard deviation and n.

    Raises:
        ValueError: there are no values.
    """
    values = list(values)
    if not values:
        raise ValueError("no values to summarise")
    n = len(values)
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) if n > 1 else None
    return Summary(mean, deviation, n)


def paired_difference(values: Mapping[Key, float], baseline: Mapping[Key, float], *, level: float = 0.95) -> Interval | None:
    """Return the mean of `values - baseline` over the keys (seeds) that both have, with Student's t-interval.

    Pairing by seed takes out what the two share: the few-shot draw, the order of the batches, the head's start.

    Args:
        values: value by seed.
        baseline: value by seed.
        level: probability covered by the interval.

    Returns:
        The difference; None if no seed is shared. One shared seed gives a difference without an interval.
    """
    shared = [key for key in values if key in baseline]
    if not shared:
        return None
    summary = summarise(values[key] - baseline[key] for key in shared)
    if summary.error is None:
        return Interval(summary.mean, None, None, 1)
    half = float(stdtrit(summary.n - 1, (1 + level) / 2)) * summary.error
    return Interval(summary.mean, summary.mean - half, summary.mean + half, summary.n)


def seeds_to_settle(mean: float, deviation: float, *, level: float = 0.95, most: int = 200) -> int | None:
    """Return the smallest number of pairs whose t-interval around this mean would exclude zero, at this deviation.

    Args:
        mean: mean of the paired differences.
        deviation: their sample standard deviation.
        level: probability covered by the interval.
        most: largest number that is tried.

    Returns:
        2 or more; None if `most` pairs are not enough.
    """
    for n in range(2, most + 1):
        if float(stdtrit(n - 1, (1 + level) / 2)) * deviation / math.sqrt(n) < abs(mean):
            return n
    return None
