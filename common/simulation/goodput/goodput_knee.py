"""The goodput of a deployment: the highest rate at which the wanted share of requests is good."""

import math
from collections.abc import Callable
from dataclasses import dataclass

WANTED = 0.9
PRECISION = 0.02
MOST_TRIED = 60
FIRST_STEP = 0.15
"""Of the logarithm of the rate, away from the first guess; it doubles with each step, up to a factor of two."""
LEAST_SHARE = 2.0**-10
"""Of the first guess: what is below is no rate."""
EDGE = 0.15
"""Of a gap: a guess between its ends keeps that far from both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Knee:
    """`rate` attains `attained`; a rate that is `PRECISION` higher does not attain what is wanted. Zero: not even a trickle
    does (or none that was worth looking at). `tried`: every rate that was simulated."""

    rate: float
    attained: float
    tried: tuple[tuple[float, float], ...]


def find_knee(attained_at: Callable[[float], float], *, wanted: float = WANTED, start: float = 1.0, least: float = 0.0) -> Knee:
    """Away from `start` until the knee is between two rates, then by interpolation, and by halving where that is slow. One
    simulation a rate. `least`: lower rates are not looked at."""
    tried: dict[float, float] = {}

    def attains(rate: float) -> bool:
        tried[rate] = attained_at(rate)
        return tried[rate] >= wanted

    least = max(least, start * LEAST_SHARE)
    low = high = start
    step = FIRST_STEP
    if attains(start):
        while attains(high := low * math.exp(step)):
            low, step = high, min(2.0 * step, math.log(2.0))
            if len(tried) > MOST_TRIED:
                return _knee(low, tried)
    else:
        while high > least and not attains(low := max(least, high * math.exp(-step))):
            high, step = low, min(2.0 * step, math.log(2.0))
        if tried[low] < wanted:
            return Knee(rate=0.0, attained=0.0, tried=tuple(tried.items()))
    halves = False
    while high > low * (1.0 + PRECISION):
        part = (tried[low] - wanted) / (tried[low] - tried[high])
        part = 0.5 if halves else min(1.0 - EDGE, max(EDGE, part))
        middle = low * (high / low) ** part
        gap = math.log(high / low)
        low, high = (middle, high) if attains(middle) else (low, middle)
        halves = math.log(high / low) > 0.5 * gap
    return _knee(low, tried)


def _knee(rate: float, tried: dict[float, float]) -> Knee:
    return Knee(rate=rate, attained=tried[rate], tried=tuple(tried.items()))
