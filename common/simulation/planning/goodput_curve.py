"""Attainment against rate over several seeds, and how sure the goodput is.

The search chose its best rate on the first seed; the others have not been seen by it. Wilson's interval is of the requests of all
seeds together, but requests of one run wait for each other, so the goodput's interval is at least as wide as the seeds lie apart.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from common.simulation.goodput.goodput_report import wilson
from common.simulation.planning.trial import Trial

RATES = (0.8, 0.9, 1.0, 1.1, 1.25)
"""Times the goodput that the search found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """`attained` over all seeds with its 95 % interval; `least` and `most` of single seeds."""

    rate: float
    attained: float
    low: float
    high: float
    least: float
    most: float
    late: float
    slow: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GoodputCurve:
    """`goodput` is where the curve crosses what is wanted, `low` and `high` where the ends of its interval do, or single seeds
    where they lie further apart."""

    points: tuple[CurvePoint, ...]
    goodput: float
    low: float
    high: float


def draw_curve(attempt: Callable[[float, int], Trial], goodput: float, seeds: Sequence[int], *, wanted: float) -> GoodputCurve:
    """`attempt` takes a rate and a seed."""
    points = []
    for factor in RATES:
        rate = factor * goodput
        trials = [attempt(rate, seed) for seed in seeds]
        requests = sum(trial.requests for trial in trials)
        low, high = wilson(sum(trial.good for trial in trials), requests)
        shares = [trial.attained for trial in trials]
        points.append(
            CurvePoint(
                rate=rate,
                attained=sum(trial.good for trial in trials) / requests,
                low=low,
                high=high,
                least=min(shares),
                most=max(shares),
                late=sum(trial.late for trial in trials) / requests,
                slow=sum(trial.slow for trial in trials) / requests,
            )
        )
    return GoodputCurve(
        points=tuple(points),
        goodput=crossing([(point.rate, point.attained) for point in points], wanted),
        low=crossing([(point.rate, min(point.low, point.least)) for point in points], wanted),
        high=crossing([(point.rate, max(point.high, point.most)) for point in points], wanted),
    )


def crossing(points: Sequence[tuple[float, float]], wanted: float) -> float:
    """The first rate at which a falling line goes below: the first or last one's where it does not between them."""
    if points[0][1] < wanted:
        return points[0][0]
    for (rate, share), (next_rate, next_share) in pairwise(points):
        if next_share < wanted:
            return rate + (next_rate - rate) * (share - wanted) / (share - next_share)
    return points[-1][0]
