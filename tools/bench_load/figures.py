"""From points to figures: latencies, attainment and goodput of each rate, and the knee."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tools.bench_load.goodput import Attainment, attainment, attainment_by_class, duration_s, fluidity, goodput_per_s
from tools.bench_load.knee import Knee, RatePoint, find_knee
from tools.bench_load.quantiles import Interval, Summary, bootstrap, quantile, summarise
from tools.bench_load.request_class import Objective
from tools.bench_load.request_result import RequestResult
from tools.bench_load.results_file import Point
from tools.bench_load.stages import StageSummary, summarise_stages

FLUID = 0.9
"""A request whose tokens came by their deadlines to this part counts as fluid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PointFigures:
    """Of the measured requests; latencies of those that ended well, in seconds, from the scheduled send. `ttft_p90` and
    `itl_p99` are bootstrapped 95 % intervals; `fluid_share` and the attainments are None or empty without objectives."""

    point: Point
    requests: int
    completed: int
    duration_s: float
    ttft: Summary | None
    tpot: Summary | None
    itl: Summary | None
    latency: Summary | None
    lag: Summary | None
    ttft_p90: Interval | None
    itl_p99: Interval | None
    attainment: Attainment | None
    by_class: dict[str, Attainment]
    goodput_per_s: float | None
    fluidity: Summary | None
    fluid_share: float | None
    wrong_prompt_lengths: int
    wrong_output_lengths: int
    cached_tokens: int
    errors: dict[str, int]
    stages: StageSummary

    @property
    def completed_per_s(self) -> float:
        return self.completed / self.duration_s if self.duration_s else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """`curve` has one point a rate, its seeds pooled; `knee` is None without an open loop and objectives."""

    points: tuple[PointFigures, ...]
    curve: tuple[RatePoint, ...]
    knee: Knee | None
    target: float
    objectives: Mapping[str, Objective]


def report_of(points: Sequence[Point], objectives: Mapping[str, Objective], *, target: float) -> BenchReport:
    curve = rate_curve(points, objectives)
    return BenchReport(
        points=tuple(figures_of(point, objectives) for point in points),
        curve=curve,
        knee=find_knee(curve, target, random.Random("knee")),
        target=target,
        objectives=objectives,
    )


def rate_curve(points: Sequence[Point], objectives: Mapping[str, Objective]) -> tuple[RatePoint, ...]:
    """All seeds of one rate together."""
    by_rate: dict[float, list[Point]] = {}
    for point in points:
        rate = point.key.rate if point.key.rate is not None else point.real_rate
        if rate is not None and point.real_rate is not None:
            by_rate.setdefault(rate, []).append(point)
    curve = []
    for rate, group in sorted(by_rate.items()):
        judged = [attainment(point.results, objectives) for point in group]
        if any(one.requests for one in judged):
            curve.append(
                RatePoint(
                    rate=rate,
                    real_rate=sum(point.real_rate or rate for point in group) / len(group),
                    good=sum(one.good for one in judged),
                    total=sum(one.requests for one in judged),
                )
            )
    return tuple(curve)


def figures_of(point: Point, objectives: Mapping[str, Objective]) -> PointFigures:
    measured = point.measured
    complete = [one for one in measured if one.is_complete]
    judged = [one for one in measured if one.kind in objectives]
    fluid = [fluidity(one, objectives[one.kind]) for one in judged]
    ttfts = [one.ttft_s for one in complete if one.ttft_s is not None]
    gaps = [gap for one in complete for gap in one.gaps_s]
    return PointFigures(
        point=point,
        requests=len(measured),
        completed=len(complete),
        duration_s=duration_s(measured),
        ttft=summarise(ttfts),
        tpot=summarise([one.tpot_s for one in complete if one.tpot_s is not None and one.output_tokens > 1]),
        itl=summarise(gaps),
        latency=summarise([one.latency_s for one in complete]),
        lag=summarise([one.lag_s for one in measured]),
        ttft_p90=bootstrap(ttfts, _at(0.90), random.Random("ttft")) if ttfts else None,
        itl_p99=_itl_interval(complete) if gaps else None,
        attainment=attainment(measured, objectives) if judged else None,
        by_class=attainment_by_class(measured, objectives),
        goodput_per_s=goodput_per_s(measured, objectives) if judged else None,
        fluidity=summarise(fluid),
        fluid_share=sum(value >= FLUID for value in fluid) / len(fluid) if fluid else None,
        wrong_prompt_lengths=sum(one.prompt_tokens != one.planned_prompt_tokens for one in complete),
        wrong_output_lengths=sum(one.output_tokens != one.planned_output_tokens for one in complete),
        cached_tokens=sum(one.cached_tokens or 0 for one in complete),
        errors=_errors(measured),
        stages=summarise_stages(complete),
    )


def _at(share: float) -> Callable[[Sequence[float]], float]:
    return lambda values: quantile(sorted(values), share)


def _itl_interval(complete: Sequence[RequestResult]) -> Interval:
    """Requests are drawn, not gaps: the gaps of one request hang together."""
    figure = _at(0.99)
    return bootstrap(
        complete, lambda drawn: figure([gap for one in drawn for gap in one.gaps_s] or [0.0]), random.Random("itl"), resamples=100
    )


def _errors(measured: Sequence[RequestResult]) -> dict[str, int]:
    counted: dict[str, int] = {}
    for one in measured:
        if one.error is not None:
            counted[one.error] = counted.get(one.error, 0) + 1
    return counted
