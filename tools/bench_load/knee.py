"""The goodput knee: the highest rate at which the wanted part of all requests is good, and which rate to try next."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tools.bench_load.quantiles import Interval, quantile

LOWEST = 1 / 64
"""Of the first rate: below it nothing is tried."""
HIGHEST = 64.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RatePoint:
    """All that was measured at one rate. `rate` is the one that was asked for, `real_rate` the one that was drawn."""

    rate: float
    real_rate: float
    good: int
    total: int

    @property
    def share(self) -> float:
        return self.good / self.total if self.total else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Knee:
    """`is_bound`: no rate failed, so the knee lies at or above this one."""

    rate: float
    is_bound: bool
    interval: Interval


def find_knee(points: Sequence[RatePoint], target: float, rng: random.Random, *, resamples: int = 1000) -> Knee | None:
    """Linear between the last rate that attains `target` and the first that does not. The interval redraws every point's
    number of good requests (parametric bootstrap)."""
    if not points:
        return None
    ordered = sorted(points, key=lambda point: point.real_rate)
    rates = [point.real_rate for point in ordered]
    rate, is_bound = _crossing(rates, [point.share for point in ordered], target)
    drawn = sorted(_crossing(rates, [_redrawn(point, rng) for point in ordered], target)[0] for _ in range(resamples))
    return Knee(rate=rate, is_bound=is_bound, interval=Interval(low=quantile(drawn, 0.025), high=quantile(drawn, 0.975)))


def next_rate(points: Sequence[RatePoint], *, target: float, first: float, precision: float) -> float | None:
    """Doubled until a rate fails, halved until one attains, then in the middle of the two, until they are within `precision`
    (0.1: 10 %) of each other. None when that is so."""
    good = [point.rate for point in points if point.share >= target]
    bad = [point.rate for point in points if point.share < target]
    if not points:
        return first
    if not bad:
        return _within(max(good) * 2, first)
    lowest_bad = min(bad)
    below = [rate for rate in good if rate < lowest_bad]
    if not below:
        return _within(lowest_bad / 2, first)
    highest_good = max(below)
    if lowest_bad <= highest_good * (1 + precision):
        return None
    return round((highest_good + lowest_bad) / 2, 4)


def _within(rate: float, first: float) -> float | None:
    return rate if first * LOWEST <= rate <= first * HIGHEST else None


def _crossing(rates: Sequence[float], shares: Sequence[float], target: float) -> tuple[float, bool]:
    last_rate, last_share = 0.0, 1.0
    for rate, share in zip(rates, shares, strict=True):
        if share < target:
            return last_rate + (rate - last_rate) * (last_share - target) / max(1e-9, last_share - share), False
        last_rate, last_share = rate, share
    return last_rate, True


def _redrawn(point: RatePoint, rng: random.Random) -> float:
    return sum(rng.random() < point.share for _ in range(point.total)) / point.total if point.total else 0.0
