"""Reports under the names that others' tools read: `vllm bench serve`'s flat fields, aiperf's metric blocks, a line a request.

Our TTFT and latencies count from the scheduled send. What aiperf calls `inter_token_latency` is a request's mean (our TPOT).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime

from tools.bench_load.figures import BenchReport, PointFigures
from tools.bench_load.goodput import fluidity, is_good, meets_tpot, meets_ttft
from tools.bench_load.quantiles import PERCENTILES, Summary, summarise
from tools.bench_load.request_class import Objective
from tools.bench_load.request_result import RequestResult
from tools.bench_load.results_file import Point

Json = Mapping[str, object]


def report_json(report: BenchReport) -> Json:
    """One object: the knee, the curve, and each point in both formats."""
    return {
        "target": report.target,
        "objectives": {name: asdict(one) for name, one in report.objectives.items()},
        "knee": None if report.knee is None else asdict(report.knee),
        "curve": [{**asdict(point), "attainment": point.share} for point in report.curve],
        "points": [
            {**vllm_fields(figures), "segue": own_fields(figures), "aiperf": aiperf_metrics(figures)} for figures in report.points
        ],
    }


def vllm_fields(figures: PointFigures) -> Json:
    key, measured = figures.point.key, figures.point.measured
    complete = [one for one in measured if one.is_complete]
    took = figures.duration_s or 1e-9
    prompt, output = sum(one.prompt_tokens for one in complete), sum(one.output_tokens for one in complete)
    return {
        "date": datetime.fromtimestamp(figures.point.started_at, UTC).strftime("%Y%m%d-%H%M%S"),
        "backend": "openai-chat" if key.api == "chat" else "openai",
        "label": key.label,
        "model_id": key.model,
        "num_prompts": figures.requests,
        "request_rate": key.rate if key.rate is not None else "inf",
        "duration": figures.duration_s,
        "completed": figures.completed,
        "failed": figures.requests - figures.completed,
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": figures.completed / took,
        "request_goodput": figures.goodput_per_s,
        "output_throughput": output / took,
        "total_token_throughput": (prompt + output) / took,
        "max_concurrent_requests": _most_at_once(measured),
        **_vllm_latency("ttft", figures.ttft),
        **_vllm_latency("tpot", figures.tpot),
        **_vllm_latency("itl", figures.itl),
        **_vllm_latency("e2el", figures.latency),
        "input_lens": [one.prompt_tokens for one in measured],
        "output_lens": [one.output_tokens for one in measured],
        "ttfts": [one.ttft_s for one in measured],
        "itls": [one.gaps_s for one in measured],
        "errors": [one.error or "" for one in measured],
    }


def own_fields(figures: PointFigures) -> Json:
    judged = figures.attainment
    return {
        "key": asdict(figures.point.key),
        "real_rate": figures.point.real_rate,
        "attainment": None if judged is None else {**asdict(judged), "share": judged.share, **asdict(judged.interval)},
        "attainment_by_class": {kind: {**asdict(one), "share": one.share} for kind, one in figures.by_class.items()},
        "fluidity_mean": None if figures.fluidity is None else figures.fluidity.mean,
        "fluid_share": figures.fluid_share,
        "sender_lag_ms": None if figures.lag is None else _block("ms", figures.lag, 1e3),
        "ttft_p90_interval_s": None if figures.ttft_p90 is None else asdict(figures.ttft_p90),
        "itl_p99_interval_s": None if figures.itl_p99 is None else asdict(figures.itl_p99),
        "wrong_prompt_lengths": figures.wrong_prompt_lengths,
        "wrong_output_lengths": figures.wrong_output_lengths,
        "cached_tokens": figures.cached_tokens,
        "stages_ms": {name: _block("ms", summary, 1e3) for name, summary in figures.stages.stages.items()},
        "timelines": figures.stages.timelines,
        "moments_not_recorded": figures.stages.missing,
    }


def aiperf_metrics(figures: PointFigures) -> Json:
    complete = [one for one in figures.point.measured if one.is_complete]
    took = figures.duration_s or 1e-9
    output = [float(one.output_tokens) for one in complete]
    records = {
        "time_to_first_token": ("ms", figures.ttft, 1e3),
        "inter_token_latency": ("ms", figures.tpot, 1e3),
        "request_latency": ("ms", figures.latency, 1e3),
        "output_sequence_length": ("tokens", summarise(output), 1.0),
        "input_sequence_length": ("tokens", summarise([float(one.prompt_tokens) for one in complete]), 1.0),
    }
    blocks: dict[str, object] = {
        name: _block(unit, summary, factor) for name, (unit, summary, factor) in records.items() if summary is not None
    }
    scalars = {
        "request_count": ("requests", float(figures.completed)),
        "error_request_count": ("requests", float(figures.requests - figures.completed)),
        "request_throughput": ("requests/sec", figures.completed / took),
        "output_token_throughput": ("tokens/sec", sum(output) / took),
        "benchmark_duration": ("sec", figures.duration_s),
        "goodput": ("requests/sec", figures.goodput_per_s),
    }
    return {**blocks, **{name: {"unit": unit, "avg": value} for name, (unit, value) in scalars.items() if value is not None}}


def request_lines(points: Sequence[Point], objectives: Mapping[str, Objective]) -> Iterator[Json]:
    """A line a request, warm-up included, all that a figure is computed from and the verdicts."""
    for point in points:
        for one in point.results:
            yield {
                "rate": point.key.rate,
                "seed": point.key.seed,
                **asdict(one),
                "lag_s": one.lag_s,
                "ttft_s": one.ttft_s,
                "tpot_s": one.tpot_s,
                "latency_s": one.latency_s,
                **_verdict(one, objectives.get(one.kind)),
            }


def _verdict(one: RequestResult, objective: Objective | None) -> Json:
    if objective is None:
        return {}
    return {
        "ttft_good": meets_ttft(one, objective),
        "tpot_good": meets_tpot(one, objective),
        "good": is_good(one, objective),
        "fluidity": fluidity(one, objective),
    }


def _vllm_latency(name: str, summary: Summary | None) -> Json:
    if summary is None:
        return {}
    shown = {f"p{percent}_{name}_ms": summary.percentiles[percent] * 1e3 for percent in (50, 90, 95, 99)}
    return {
        f"mean_{name}_ms": summary.mean * 1e3,
        f"median_{name}_ms": summary.percentiles[50] * 1e3,
        f"std_{name}_ms": summary.deviation * 1e3,
        **shown,
    }


def _block(unit: str, summary: Summary, factor: float) -> Json:
    return {
        "unit": unit,
        "avg": summary.mean * factor,
        "min": summary.low * factor,
        "max": summary.high * factor,
        "std": summary.deviation * factor,
        "count": summary.count,
        **{f"p{percent}": summary.percentiles[percent] * factor for percent in PERCENTILES},
    }


def _most_at_once(results: Sequence[RequestResult]) -> int:
    """The most requests that were under way together."""
    changes = sorted([(one.sent_s, 1) for one in results] + [(one.ended_s, -1) for one in results])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
