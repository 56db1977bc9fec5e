"""Calibrations find the step times that made the measurements: of steps themselves, and of streams seen by a client."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.policy.calibration import CalibrationSubject, fit_step_time
from common.policy.step_time import DecodeLine, DecodeTime, PrefillTime, StepTime
from tools.bench_load.request_result import RequestResult
from tools.calibration.endpoint_fit import EndpointTimes, endpoint_calibration
from tools.calibration.endpoint_plan import LoadGroup, LoadPlan, Pace, load_plan
from tools.calibration.endpoint_samples import pace_samples, prompt_samples
from tools.calibration.step_shapes import ChunkShape, MixedShape, RowsShape, ShapeLimits, step_shapes
from tools.calibration.visit_times import points_of

LIMITS = ShapeLimits(kv_tokens=16_384, max_tokens=4096, max_rows=32, max_chunk=4096)
bases = st.floats(1e-4, 0.05)
prefills = st.builds(PrefillTime, base_s=bases, per_token_s=st.floats(1e-6, 2e-3), per_pair_s=st.floats(1e-10, 1e-6))
lines = st.builds(DecodeLine, base_s=bases, per_kv_token_s=st.floats(1e-8, 5e-6), per_sequence_s=st.floats(1e-5, 5e-3))
times = st.builds(StepTime, prefill=prefills, decode=st.builds(DecodeTime, line=lines))


@given(times)
def test_the_design_of_steps_recovers_any_model(time: StepTime) -> None:
    fitted = measured(time, noise=0.0)
    for tokens, past in ((32, 0), (333, 1000), (2048, 0)):
        assert fitted.prefill.seconds(tokens, past) == pytest.approx(time.prefill.seconds(tokens, past), rel=0.02)
    for rows, context in ((1, 100), (5, 700), (32, 300)):
        assert fitted.decode.seconds(rows, rows * context) == pytest.approx(time.decode.seconds(rows, rows * context), rel=0.02)


@given(times, st.integers(0, 99))
@settings(max_examples=40)
def test_noise_is_averaged_not_believed(time: StepTime, seed: int) -> None:
    """Points 3 % off, as the medians of a disturbed machine are: predictions of steps within the design are hardly more off."""
    fitted = measured(time, noise=0.03, seed=seed)
    assert fitted.prefill.seconds(400, 200) == pytest.approx(time.prefill.seconds(400, 200), rel=0.06)
    assert fitted.decode.seconds(6, 1800) == pytest.approx(time.decode.seconds(6, 1800), rel=0.06)


def measured(time: StepTime, *, noise: float, seed: int = 0) -> StepTime:
    rng = random.Random(seed)
    points = points_of({shape: [seconds(time, shape) * rng.uniform(1 - noise, 1 + noise)] * 3 for shape in step_shapes(LIMITS)})
    return fit_step_time([point.sample for point in points.prefill], [point.sample for point in points.decode]).step_time


def seconds(time: StepTime, shape: ChunkShape | RowsShape | MixedShape) -> float:
    match shape:
        case ChunkShape():
            return time.prefill.seconds(shape.tokens, shape.past)
        case RowsShape():
            return time.decode.seconds(shape.rows, shape.positions)
        case MixedShape():
            return seconds(time, shape.chunk) + seconds(time, shape.rows)


@given(
    st.builds(
        StepTime,
        prefill=st.builds(PrefillTime, base_s=st.just(0.0), per_token_s=st.floats(1e-5, 1e-3), per_pair_s=st.floats(0.0, 1e-7)),
        decode=st.builds(
            DecodeTime,
            line=st.builds(
                DecodeLine, base_s=st.floats(1e-3, 0.03), per_kv_token_s=st.floats(0.0, 1e-6), per_sequence_s=st.floats(1e-4, 3e-3)
            ),
        ),
    ),
    st.floats(0.0, 0.01),
    st.floats(0.0, 0.02),
    st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_a_server_is_recovered_from_what_its_client_sees(
    time: StepTime, round_trip_s: float, overhead_s: float, decodes_elsewhere: bool
) -> None:
    """Whether prompts stop the streams (one engine) or not (a split): only the pace between them counts. The fixed time of a
    prompt is a step's, and all beyond that the request's."""
    one_row_s = time.decode.seconds(1, 0)
    seen = EndpointTimes(round_trips_s=[round_trip_s] * 3, most_streams=8)
    alone = Pace(prompt_token_s=time.prefill.per_token_s + (round_trip_s + overhead_s + one_row_s) / 128, answer_token_s=one_row_s)
    for group in plan_of(max_requests=120, max_concurrency=8, pace=alone).groups:
        results = served(group, time, fixed_s=round_trip_s + overhead_s + one_row_s, decodes_elsewhere=decodes_elsewhere)
        if group.kind == "alone":
            seen.prompts += prompt_samples(results)
        else:
            seen.paces.setdefault(group.name, []).extend(pace_samples(results))
    found = endpoint_calibration(seen, CalibrationSubject(model="m", endpoint="e"), build="", now=0.0)
    assert found.round_trip_s == pytest.approx(round_trip_s)
    assert found.request_overhead_s == pytest.approx(overhead_s, abs=0.02 * one_row_s + 1e-4)
    assert found.step_time.prefill.seconds(700) == pytest.approx(one_row_s + time.prefill.seconds(700), rel=0.05)
    most_rows = max(point.sample.sequences for point in found.decode)
    assert most_rows == 8 or any("decoded together" in note for note in found.notes), "where answers cannot be long enough, it is said"
    for rows, context in ((1, 300), (4, 200), (8, 100)):
        if rows > most_rows:
            continue
        expected = time.decode.seconds(rows, rows * context)
        assert found.step_time.decode.seconds(rows, rows * context) == pytest.approx(expected, rel=0.05)


def plan_of(*, max_requests: int, max_concurrency: int, pace: Pace | None = None) -> LoadPlan:
    plan = load_plan(max_requests=max_requests, max_concurrency=max_concurrency, max_prompt=1024, least_prompt=31, seed=1, pace=pace)
    assert plan is not None
    return plan


def served(group: LoadGroup, time: StepTime, *, fixed_s: float, decodes_elsewhere: bool) -> list[RequestResult]:
    """A server that computes prompts one after another and batches all that decodes, as its client sees it."""
    arrivals: list[list[float]] = [[] for _ in group.requests]
    now = 0.0
    waiting = list(range(len(group.requests)))
    prompt_ends: list[tuple[float, int]] = []
    for place in waiting:
        now += fixed_s + time.prefill.seconds(group.requests[place].prompt_tokens)
        prompt_ends.append((now, place))
    for at, place in prompt_ends:
        arrivals[place].append(at)
    clock = prompt_ends[0][0] if decodes_elsewhere else prompt_ends[-1][0]
    while running := [i for i, one in enumerate(group.requests) if len(arrivals[i]) < one.output_tokens]:
        ready = [i for i in running if arrivals[i][0] <= clock]
        if not ready:
            clock = min(arrivals[i][0] for i in running)
            continue
        cached = sum(group.requests[i].prompt_tokens + len(arrivals[i]) for i in ready)
        clock += time.decode.seconds(len(ready), cached)
        for i in ready:
            arrivals[i].append(clock)
    return [result_of(group, i, arrivals[i]) for i in range(len(group.requests))]


def result_of(group: LoadGroup, place: int, arrivals: Sequence[float]) -> RequestResult:
    request = group.requests[place]
    return RequestResult(
        number=place,
        kind=request.kind,
        measured=True,
        scheduled_s=0.0,
        sent_s=0.0,
        ended_s=arrivals[-1],
        arrivals_s=tuple(arrivals),
        planned_prompt_tokens=request.prompt_tokens,
        planned_output_tokens=request.output_tokens,
        prompt_tokens=request.prompt_tokens,
        output_tokens=request.output_tokens,
    )


@given(st.integers(1, 400), st.integers(1, 40), st.integers(1, 4096), st.integers(1, 200), st.integers(0, 9))
def test_a_plan_keeps_its_bounds(max_requests: int, max_concurrency: int, max_prompt: int, least_prompt: int, seed: int) -> None:
    plan = load_plan(
        max_requests=max_requests, max_concurrency=max_concurrency, max_prompt=max_prompt, least_prompt=least_prompt, seed=seed
    )
    if plan is None:
        return
    assert plan.requests <= max_requests
    measured_pace = Pace(prompt_token_s=1e-3, answer_token_s=1e-2)
    paced = load_plan(
        max_requests=max_requests,
        max_concurrency=max_concurrency,
        max_prompt=max_prompt,
        least_prompt=least_prompt,
        seed=seed,
        pace=measured_pace,
    )
    assert paced is not None
    assert paced.output_tokens <= plan.output_tokens, "what is said before a pace is known is the most"
    assert [group.name for group in paced.groups] == [group.name for group in plan.groups]
    assert plan.most_at_once <= max_concurrency
    assert plan.rounds >= 2
    assert all(least_prompt <= one.prompt_tokens <= max_prompt for group in plan.groups for one in group.requests)


@given(st.integers(100, 1 << 20), st.integers(100, 1 << 17), st.integers(1, 512))
def test_every_step_fits_the_pool(kv_tokens: int, max_tokens: int, max_rows: int) -> None:
    limits = ShapeLimits(kv_tokens=kv_tokens, max_tokens=max_tokens, max_rows=max_rows, max_chunk=max_tokens)
    shapes = step_shapes(limits)
    assert len(set(shapes)) == len(shapes)
    assert all(shape.positions <= kv_tokens for shape in shapes)
    assert [shape.effort for shape in shapes] == sorted(shape.effort for shape in shapes)
