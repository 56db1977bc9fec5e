"""The goodput of a deployment: the highest rate at which the wanted share of requests is good."""

from collections.abc import Callable
from dataclasses import dataclass

WANTED = 0.9
PRECISION = 0.02
MOST_DOUBLINGS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Knee:
    """`rate` attains `attained`; a rate that is `PRECISION` higher does not attain what is wanted. Zero: not even a trickle
    does. `tried`: every rate that was simulated."""

    rate: float
    attained: float
    tried: tuple[tuple[float, float], ...]


def find_knee(attained_at: Callable[[float], float], *, wanted: float = WANTED, start: float = 1.0) -> Knee:
    """Doubling or halving from `start`, then halving the gap (geometrically). One simulation a rate."""
    tried: list[tuple[float, float]] = []

    def attains(rate: float) -> bool:
        tried.append((rate, attained_at(rate)))
        return tried[-1][1] >= wanted

    low, high = start, start
    if attains(start):
        while attains(high := 2.0 * low):
            low = high
            if len(tried) > MOST_DOUBLINGS:
                return _knee(low, tried)
    else:
        while not attains(low := 0.5 * high):
            high = low
            if len(tried) > MOST_DOUBLINGS // 4:
                return Knee(rate=0.0, attained=0.0, tried=tuple(tried))
    while high > low * (1.0 + PRECISION):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if attains(middle) else (low, middle)
    return _knee(low, tried)


def _knee(rate: float, tried: list[tuple[float, float]]) -> Knee:
    return Knee(rate=rate, attained=dict(tried)[rate], tried=tuple(tried))
