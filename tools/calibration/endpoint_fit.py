"""From the samples of a server measured from outside to a calibration: what is a step, what is transport, and what nobody can see."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from common.policy.calibration import Calibration, CalibrationSubject, DecodePoint, FittedStepTime, PrefillPoint, fit_step_time
from common.policy.step_time import StepTime
from common.policy.step_time_fit import DecodeSample, PrefillSample
from tools.bench_load.bench_refused import BenchRefused
from tools.calibration.endpoint_plan import LEAST_POINTS
from tools.calibration.endpoint_samples import PromptSample
from tools.calibration.visit_times import middle_of

UNSEEN = (
    "several prompts in one batch were not measured: they are taken as one prompt of as many tokens",
    "the server's chunk size is not known: what a chunk costs beside its tokens is in the time a token",
    "a router with several workers behind it spreads the streams: a step then has fewer rows than there are streams",
    "KV room, the length of queues and pre-emption cannot be seen from outside",
)


@dataclass(kw_only=True)
class EndpointTimes:
    """`paces` by burst. A round trip is the time of a request for nothing, connection included."""

    round_trips_s: list[float] = field(default_factory=list)
    prompts: list[PromptSample] = field(default_factory=list)
    paces: dict[str, list[DecodeSample]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    most_streams: int = 0
    """That were sent at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Separated:
    fitted: FittedStepTime
    overhead_s: float


def endpoint_calibration(times: EndpointTimes, subject: CalibrationSubject, *, build: str, now: float) -> Calibration:
    """Raises BenchRefused where too little was seen."""
    round_trip_s = middle_of(times.round_trips_s).seconds if times.round_trips_s else 0.0
    notes = list(UNSEEN)
    if times.prompts and round_trip_s >= min(sample.ttft_s for sample in times.prompts):
        notes.append(f"a round trip for nothing takes {round_trip_s * 1e3:.1f} ms, longer than a prompt: it is not taken off")
        round_trip_s = 0.0
    prefill = _prefill_points(times.prompts, round_trip_s)
    decode = _decode_points(times.paces)
    if len(prefill) < LEAST_POINTS or len(decode) < LEAST_POINTS:
        why = f": {times.failures[0]}" if times.failures else ""
        raise BenchRefused(
            f"{len(prefill)} lengths of prompts and {len(decode)} numbers of streams were measured; {LEAST_POINTS} are needed{why}"
        )
    separated = _separated(fit_step_time([one.sample for one in prefill], [one.sample for one in decode]))
    if times.failures:
        notes.append(f"{len(times.failures)} requests failed, the first with: {times.failures[0]}")
    most_rows = max(point.sample.sequences for point in decode)
    if most_rows < times.most_streams:
        notes.append(f"{times.most_streams} streams were sent at once, but no more than {most_rows} decoded together long enough")
    if separated.overhead_s > 0.0:
        notes.append("a short prompt is taken to need no longer a step than one decode row; what its TTFT has beyond is the request's")
    return Calibration(
        subject=subject,
        build=build,
        measured_at=now,
        fitted=separated.fitted,
        prefill=tuple(_without(point, separated.overhead_s) for point in prefill),
        decode=decode,
        round_trip_s=round_trip_s,
        request_overhead_s=separated.overhead_s,
        notes=tuple(notes),
    )


def _prefill_points(samples: Sequence[PromptSample], round_trip_s: float) -> list[PrefillPoint]:
    by_shape: dict[tuple[int, int], list[float]] = defaultdict(list)
    for sample in samples:
        by_shape[sample.tokens, sample.past].append(sample.ttft_s - round_trip_s)
    points = []
    for (tokens, past), seconds in sorted(by_shape.items()):
        middle = middle_of(seconds)
        one = PrefillSample(tokens=tokens, past=past, seconds=middle.seconds)
        points.append(PrefillPoint(sample=one, visits=middle.visits, spread=middle.spread))
    return points


def _decode_points(paces: dict[str, list[DecodeSample]]) -> tuple[DecodePoint, ...]:
    """One a burst and number of rows, over all rounds."""
    points = []
    for samples in paces.values():
        by_rows: dict[int, list[DecodeSample]] = defaultdict(list)
        for sample in samples:
            by_rows[sample.sequences].append(sample)
        for rows, same in sorted(by_rows.items()):
            middle = middle_of([sample.seconds for sample in same])
            cached = round(sum(sample.kv_tokens for sample in same) / len(same))
            one = DecodeSample(sequences=rows, kv_tokens=cached, seconds=middle.seconds)
            points.append(DecodePoint(sample=one, visits=middle.visits, spread=middle.spread))
    return tuple(points)


def _separated(fitted: FittedStepTime) -> _Separated:
    """A step reads the weights once, whether for a few tokens of a prompt or for one row: what a prompt's fixed time has beyond
    a decode step's is not the step's but the request's (reading it, tokenising, scheduling, sending)."""
    time = fitted.step_time
    step_s = time.decode.line.seconds(1, 0)
    overhead_s = max(0.0, time.prefill.base_s - step_s)
    prefill = replace(time.prefill, base_s=time.prefill.base_s - overhead_s)
    return _Separated(fitted=replace(fitted, step_time=StepTime(prefill=prefill, decode=time.decode)), overhead_s=overhead_s)


def _without(point: PrefillPoint, overhead_s: float) -> PrefillPoint:
    """What is left of a point is at least a thousandth: an overhead is a fit's, a point may lie below it."""
    seconds = max(1e-3 * point.sample.seconds, point.sample.seconds - overhead_s)
    return replace(point, sample=replace(point.sample, seconds=seconds))
