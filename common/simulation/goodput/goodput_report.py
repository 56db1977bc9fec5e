"""What came out: how many requests were good, jointly and by class, and how the times are distributed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from common.simulation.goodput.flight import Flight
from common.values.objectives import Speed

WILSON_95 = 1.959964


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Seconds. Percentiles are of the sorted values, linear between two."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassReport:
    """`attained` is joint: TTFT and TPOT of the same request. `low` and `high`: 95 % of it (Wilson). A refused request is not
    good. Times are those of the requests that were served; None where none was."""

    name: str
    requests: int
    refused: int
    attained: float
    ttft_attained: float
    tpot_attained: float
    low: float
    high: float
    ttft: Spread | None
    tpot: Spread | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GoodputReport:
    """`goodput_rps` is good requests by the time over which they arrived; `split_share`: of those served, how many were
    prefilled on one worker and decoded on another."""

    total: ClassReport
    classes: tuple[ClassReport, ...]
    offered_rps: float
    goodput_rps: float
    tokens_per_s: float
    split_share: float
    took_s: float


def report_of(flights: Sequence[Flight], *, first_token_counts: bool = True) -> GoodputReport:
    if not flights:
        raise ValueError("nothing was simulated")
    speeds = [flight.speed(first_token_counts=first_token_counts) for flight in flights]
    total = _class_report("all", flights, speeds)
    names = sorted({flight.arrival.request_class for flight in flights})
    classes = []
    for name in names if len(names) > 1 else []:
        of_class = [(f, s) for f, s in zip(flights, speeds, strict=True) if f.arrival.request_class == name]
        classes.append(_class_report(name, [f for f, _ in of_class], [s for _, s in of_class]))
    span_s = max(1e-9, flights[-1].arrival.arrived_s - flights[0].arrival.arrived_s)
    took_s = max(1e-9, max((f.ended_s for f in flights if f.ended_s is not None), default=0.0) - flights[0].arrival.arrived_s)
    served = [flight for flight in flights if not flight.refused]
    return GoodputReport(
        total=total,
        classes=tuple(classes),
        offered_rps=(len(flights) - 1) / span_s,
        goodput_rps=total.attained * (len(flights) - 1) / span_s,
        tokens_per_s=sum(flight.arrival.output_tokens for flight in served) / took_s,
        split_share=sum(flight.split for flight in served) / len(served) if served else 0.0,
        took_s=took_s,
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of values in order."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def wilson(good: int, of: int) -> tuple[float, float]:
    """Between which shares the true one lies, with 95 %."""
    share, z2 = good / of, WILSON_95**2
    middle = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = WILSON_95 * math.sqrt(share * (1 - share) / of + z2 / (4 * of * of)) / (1 + z2 / of)
    return max(0.0, middle - half), min(1.0, middle + half)


def _class_report(name: str, flights: Sequence[Flight], speeds: Sequence[Speed | None]) -> ClassReport:
    good = ttft_good = tpot_good = 0
    ttfts, tpots = [], []
    for flight, speed in zip(flights, speeds, strict=True):
        if speed is None:
            continue
        ttfts.append(speed.ttft_s)
        tpots.append(speed.tpot_s)
        on_time = speed.ttft_s <= flight.objectives.ttft_for(flight.unloaded_s)
        fluent = speed.tpot_s <= flight.objectives.tpot_s
        ttft_good += on_time
        tpot_good += fluent
        good += on_time and fluent
    count = len(flights)
    low, high = wilson(good, count)
    return ClassReport(
        name=name,
        requests=count,
        refused=sum(flight.refused for flight in flights),
        attained=good / count,
        ttft_attained=ttft_good / count,
        tpot_attained=tpot_good / count,
        low=low,
        high=high,
        ttft=_spread(ttfts),
        tpot=_spread(tpots),
    )


def _spread(values: list[float]) -> Spread | None:
    if not values:
        return None
    values.sort()
    return Spread(
        mean=sum(values) / len(values),
        p50=percentile(values, 0.5),
        p90=percentile(values, 0.9),
        p99=percentile(values, 0.99),
    )
