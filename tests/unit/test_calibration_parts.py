"""Parts of `segue calibrate`: rounds within a time, what is told, and what a client's view is worth."""

import random
from dataclasses import replace

import pytest

from common.policy.step_time_fit import DecodeSample
from tests.property.test_calibration import plan_of, result_of
from tests.unit.test_calibration_file import calibration
from tools.bench_load.bench_refused import BenchRefused
from tools.bench_load.endpoint import parse_endpoint
from tools.calibration.endpoint_fit import EndpointTimes, endpoint_calibration
from tools.calibration.endpoint_options import EndpointOptions
from tools.calibration.endpoint_plan import LoadGroup
from tools.calibration.endpoint_run import announcement
from tools.calibration.endpoint_samples import pace_samples, prompt_samples
from tools.calibration.progress_line import progress_line
from tools.calibration.report import calibration_report
from tools.calibration.step_shapes import ChunkShape, StepShape
from tools.calibration.visit_rounds import LEAST_ROUNDS, VisitTimes, visit_in_rounds

SHAPES = tuple(ChunkShape(tokens=tokens) for tokens in (1, 2, 4, 8, 16, 32))


class Machine:
    """A step takes as many seconds as it has tokens."""

    def __init__(self) -> None:
        self.now = 0.0
        self.visited: list[StepShape] = []

    async def visit(self, shape: StepShape) -> list[float]:
        self.visited.append(shape)
        self.now += shape.effort
        return [shape.effort]


async def rounds_within(budget_s: float) -> tuple[Machine, VisitTimes]:
    machine = Machine()
    found = await visit_in_rounds(
        SHAPES,
        machine.visit,
        budget_s=budget_s,
        clock=lambda: machine.now,
        on_visit=lambda shape, elapsed_s: None,
        rng=random.Random(1),
    )
    return machine, found


async def test_rounds_end_with_the_time_and_mix_the_order() -> None:
    machine, found = await rounds_within(400.0)
    assert machine.now <= 400.0 + SHAPES[-1].effort
    assert found.rounds >= 5
    assert not found.left_out
    assert min(map(len, found.times.values())) >= found.rounds
    orders = {tuple(machine.visited[start : start + 6]) for start in range(3, 3 + 6 * found.rounds, 6)}
    assert len(orders) > 1
    assert machine.visited[:3] == list(SHAPES[:3]), "the first visits warm up"
    assert len(found.times[SHAPES[0]]) < machine.visited.count(SHAPES[0])


async def test_what_takes_too_long_is_left_out_and_said() -> None:
    machine, found = await rounds_within(100.0)
    assert found.left_out == SHAPES[-1:]
    assert set(found.times) == set(SHAPES[:-1])
    assert found.rounds >= 1
    assert machine.now <= 100.0 + SHAPES[-2].effort * LEAST_ROUNDS * 2


def test_the_load_is_said_before_it_is_sent() -> None:
    options = EndpointOptions(
        endpoint=parse_endpoint("http://host:1", api="chat", model="m", api_key="secret", extra={}),
        max_requests=200,
        max_concurrency=16,
        max_prompt=1024,
        timeout_s=9.0,
        seed=0,
        is_dry_run=True,
    )
    said = announcement(options)
    assert "host:1 at most 191 requests" in said
    assert "at most 16 at once" in said
    assert "secret" not in said
    with pytest.raises(BenchRefused, match="is at least 121"):
        announcement(replace(options, max_requests=60))


def burst(*arrivals: list[float]) -> LoadGroup:
    requests = plan_of(max_requests=100, max_concurrency=8).groups[0].requests[:1]
    return LoadGroup(name="burst", kind="burst", requests=tuple(replace(requests[0], output_tokens=len(each)) for each in arrivals))


def test_the_pace_counts_only_while_the_streams_stay_the_same() -> None:
    """Two streams at a token a second; when the second's last has come, the first goes on twice as fast."""
    first = [float(at) for at in range(1, 11)] + [10.0 + 0.5 * step for step in range(1, 11)]
    second = [float(at) for at in range(3, 11)]
    group = burst(first, second)
    results = [result_of(group, 0, first), result_of(group, 1, second)]
    both, alone = pace_samples(results)
    assert (both.sequences, both.seconds) == (2, pytest.approx(1.0))
    assert (alone.sequences, alone.seconds) == (1, pytest.approx(0.5))
    prompt = group.requests[0].prompt_tokens
    assert both.kv_tokens == 2 * prompt + 6 + 4, "at second 6.5"
    broken = [results[0], replace(results[1], error="gone")]
    assert pace_samples(broken) == [], "nobody knows when its row left"


def test_events_of_several_tokens_are_several_steps() -> None:
    arrivals = [float(at) for at in range(1, 21)]
    (sample,) = pace_samples([replace(result_of(burst(arrivals), 0, arrivals), output_tokens=39)])
    assert sample.seconds == pytest.approx(0.5)


def test_what_was_cached_is_not_counted_as_computed() -> None:
    result = replace(result_of(burst([2.0]), 0, [2.0]), prompt_tokens=100, cached_tokens=32)
    (sample,) = prompt_samples([result])
    assert (sample.tokens, sample.past, sample.ttft_s) == (68, 32, 2.0)


def test_too_little_is_refused_with_what_failed() -> None:
    few = EndpointTimes(paces={"a": [DecodeSample(sequences=1, kv_tokens=9, seconds=0.1)]}, failures=["status 503: busy"])
    with pytest.raises(BenchRefused, match="busy"):
        endpoint_calibration(few, calibration().subject, build="", now=0.0)


def test_the_report_has_every_point_and_the_worst() -> None:
    text = calibration_report(calibration())
    assert text.count("prefill ") >= 8
    assert "64 after 0 beside 4 x 128" in text
    assert "from 16 sequences on" in text
    assert "worst of the fitted points" in text
    assert "confidence good" in text
    assert "note: quiet" in text


def test_the_line_of_progress_ends_full() -> None:
    assert "·" not in progress_line("x", 9.0, 9.0, "s")
    assert progress_line("x", 0.0, 0.0, "s").count("█") == 30
    assert progress_line("decode 1 x 64", 3.0, 9.0, "s").endswith("3 of 9 s, decode 1 x 64")
