"""The report of `segue bench` as it is read in a terminal: a block a point, the curve, the knee."""

from collections.abc import Iterator

from tools.bench_load.figures import FLUID, BenchReport, PointFigures
from tools.bench_load.quantiles import Interval, Summary

LAG_TO_WARN_S = 0.02


def as_text(report: BenchReport) -> str:
    lines = [line for figures in report.points for line in (*_point(figures), "")]
    if len(report.curve) > 1:
        lines += [
            "rate req/s   good",
            *(f"{point.real_rate:10.3f}   {point.share:.1%} of {point.total}" for point in report.curve),
            "",
        ]
    return "\n".join(lines + _knee(report))


def _knee(report: BenchReport) -> list[str]:
    knee = report.knee
    if knee is None:
        return []
    at_least = "at least " if knee.is_bound else ""
    interval = "" if knee.is_bound else f" ({_range(knee.interval, 1.0, '.3f')} with 95 % confidence)"
    return [f"goodput: {report.target:.0%} of all requests are good up to {at_least}{knee.rate:.3f} req/s{interval}"]


def _point(figures: PointFigures) -> Iterator[str]:
    key = figures.point.key
    rate = "" if key.rate is None else f" {key.rate:g} req/s"
    yield f"{key.label} {key.model}: {key.workload}, {key.arrivals}{rate}, seed {key.seed}"
    drawn = "" if figures.point.real_rate is None else f" (drawn: {figures.point.real_rate:.3f} req/s)"
    yield (
        f"  {figures.completed} of {figures.requests} completed in {figures.duration_s:.1f} s{drawn}, "
        f"{figures.completed_per_s:.3f} req/s"
    )
    if figures.attainment is not None:
        judged = figures.attainment
        yield (
            f"  good {judged.share:.1%} ({_range(judged.interval, 100, '.1f')} %), in TTFT "
            f"{judged.ttft_good / judged.requests:.1%}, in TPOT {judged.tpot_good / judged.requests:.1%}; "
            f"goodput {figures.goodput_per_s or 0.0:.3f} req/s; fluid (>= {FLUID:.0%}) {figures.fluid_share or 0.0:.1%}"
        )
        yield "  good by class: " + ", ".join(f"{kind} {one.share:.1%} of {one.requests}" for kind, one in figures.by_class.items())
    yield "                     mean      p50      p90      p99      max"
    for name, summary in (
        ("TTFT ms", figures.ttft),
        ("TPOT ms", figures.tpot),
        ("ITL ms", figures.itl),
        ("latency ms", figures.latency),
    ):
        yield from _latencies(name, summary)
    for name, summary in figures.stages.stages.items():
        yield from _latencies(f"{name} ms", summary)
    yield from _remarks(figures)


def _latencies(name: str, summary: Summary | None) -> Iterator[str]:
    if summary is not None:
        values = (summary.mean, *(summary.percentiles[percent] for percent in (50, 90, 99)), summary.high)
        yield f"  {name:<15}" + "".join(f"{value * 1e3:9.1f}" for value in values)


def _remarks(figures: PointFigures) -> Iterator[str]:
    lag = figures.lag
    if lag is not None:
        warn = "; the client was too slow, its lag is in every latency" if lag.percentiles[99] > LAG_TO_WARN_S else ""
        p50, p99 = lag.percentiles[50] * 1e3, lag.percentiles[99] * 1e3
        yield f"  sender lag ms: p50 {p50:.2f}, p99 {p99:.2f}, max {lag.high * 1e3:.2f}{warn}"
    for name, count in (("prompt", figures.wrong_prompt_lengths), ("output", figures.wrong_output_lengths)):
        if count:
            yield f"  {count} requests had another {name} length than planned"
    if figures.stages.timelines and figures.stages.missing:
        yield f"  the server's timelines lack {', '.join(figures.stages.missing)}: the stages beside these are unknown"
    for error, count in figures.errors.items():
        yield f"  {count} x {error}"


def _range(interval: Interval, factor: float, form: str) -> str:
    return f"{interval.low * factor:{form}} to {interval.high * factor:{form}}"
