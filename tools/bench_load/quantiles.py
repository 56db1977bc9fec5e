"""Percentiles, and how far figures of few requests can be trusted."""

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")
PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
Z_95 = 1.959964


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """`percentiles` by number. `deviation` is the sample's."""

    count: int
    mean: float
    deviation: float
    low: float
    high: float
    percentiles: dict[int, float]


def quantile(ordered: Sequence[float], share: float) -> float:
    """Linear between the two nearest of an ascending, non-empty sequence."""
    place = (len(ordered) - 1) * share
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summarise(values: Sequence[float]) -> Summary | None:
    """None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return Summary(
        count=len(ordered),
        mean=statistics.fmean(ordered),
        deviation=statistics.stdev(ordered) if len(ordered) > 1 else 0.0,
        low=ordered[0],
        high=ordered[-1],
        percentiles={percent: quantile(ordered, percent / 100) for percent in PERCENTILES},
    )


def wilson(successes: int, total: int, z: float = Z_95) -> Interval:
    """Of a share (Wilson 1927): never outside 0 to 1, and honest at 0 and at 1."""
    if total == 0:
        return Interval(low=0.0, high=1.0)
    share = successes / total
    spread = z**2 / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return Interval(low=max(0.0, min(share, centre - half)), high=min(1.0, max(share, centre + half)))


def bootstrap(
    items: Sequence[Item], figure: Callable[[Sequence[Item]], float], rng: random.Random, *, resamples: int = 500
) -> Interval:
    """The middle 95 % of a figure over resampled items (percentile bootstrap)."""
    drawn = sorted(figure(rng.choices(items, k=len(items))) for _ in range(resamples))
    return Interval(low=quantile(drawn, 0.025), high=quantile(drawn, 0.975))
