"""The parts around the simulator: workloads, traces, rescaling, reports, the knee, the prefix cache."""

import itertools
import json
import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.simulation.goodput.flight import Arrival, Flight
from common.simulation.goodput.goodput_knee import PRECISION, find_knee
from common.simulation.goodput.goodput_report import percentile, report_of, wilson
from common.simulation.goodput.prefix_cache import SimulatedPrefixCache
from common.simulation.goodput.rescaling import at_rate, fitting, shrunk, stretched, thinned
from common.simulation.goodput.step_run import StepRun
from common.simulation.goodput.traces import azure_arrivals, mooncake_arrivals, trace_arrivals
from common.simulation.goodput.workloads import Lengths, RequestClass, Workload, total_rate
from common.values.objectives import Objectives

OBJECTIVES = Objectives(ttft_s=1.0, tpot_s=0.1)
CHAT = RequestClass(name="chat", prompt=Lengths(mean=200.0, sigma=0.8), output=Lengths(mean=50.0), objectives=OBJECTIVES)
MOONCAKE = [
    '{"timestamp": 3000, "input_length": 900, "output_length": 5, "hash_ids": [0, 1]}',
    '{"timestamp": 0, "input_length": 600, "output_length": 0, "hash_ids": [0, 2]}',
]
AZURE = ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:17:03.9799600,4808,10", "2023-11-16 18:17:04.0319600,3180,8"]


@given(st.floats(0.0, 5.0), st.floats(0.001, 1.0), st.floats(0.0, 0.01), st.integers(1, 5000), st.floats(-1.0, 9000.0))
def test_the_next_boundary_is_the_first_that_is_not_over(start: float, first: float, growth: float, end: int, later: float) -> None:
    run = StepRun(start, first, growth, end)
    now = start + later
    steps = run.next_boundary(now)
    assert 0 <= steps <= end
    assert steps == end or run.time_at(steps) >= now
    assert steps == 0 or run.time_at(steps - 1) < now


def test_the_same_seed_is_the_same_workload_at_every_rate() -> None:
    workload = Workload(classes=(CHAT,))
    slow, quick = (workload.draw(500, rate, Random(3)) for rate in (1.0, 4.0))
    assert [a.prompt_tokens for a in slow] == [a.prompt_tokens for a in quick]
    assert [a.arrived_s for a in slow] == pytest.approx([4.0 * a.arrived_s for a in quick])
    assert total_rate(slow) == pytest.approx(1.0, rel=0.15)


@pytest.mark.parametrize("variation", [0.0, 1.0, 3.0])
def test_arrivals_vary_as_much_as_asked(variation: float) -> None:
    arrivals = Workload(classes=(CHAT,), variation=variation).draw(20_000, 2.0, Random(1))
    gaps = [b.arrived_s - a.arrived_s for a, b in itertools.pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert deviation / mean == pytest.approx(variation, rel=0.1, abs=1e-6)
    assert sum(a.prompt_tokens for a in arrivals) / len(arrivals) == pytest.approx(200.0, rel=0.05)


def test_mooncake_rows_are_sorted_and_checked() -> None:
    arrivals = mooncake_arrivals(MOONCAKE, Random(0))
    assert [(a.arrived_s, a.prompt_tokens) for a in arrivals] == [(0.0, 600), (3.0, 900)]
    assert arrivals[0].prefix == (0, 2)
    assert arrivals[0].output_tokens == 1
    with pytest.raises(ValueError, match="line 1"):
        mooncake_arrivals(["{}"], Random(0))


def test_mooncake_rows_of_one_stamp_are_spread_over_the_bin() -> None:
    rows = [(0, 100), (0, 200), (0, 300), (3000, 400)]
    lines = [json.dumps({"timestamp": at, "input_length": tokens, "output_length": 9, "hash_ids": []}) for at, tokens in rows]
    arrivals = mooncake_arrivals(lines, Random(1))
    assert sorted(a.prompt_tokens for a in arrivals) == [100, 200, 300, 400]
    assert len({a.arrived_s for a in arrivals}) == 4
    assert all(0.0 <= a.arrived_s < 3.0 for a in arrivals)


def test_a_trace_is_told_by_its_beginning() -> None:
    assert trace_arrivals("\n".join(MOONCAKE), Random(0)) == mooncake_arrivals(MOONCAKE, Random(0))
    assert trace_arrivals("\ufeff" + "\n".join(AZURE), Random(0)) == azure_arrivals(AZURE)


@pytest.mark.parametrize("text", ["", "{}", "a,b\n1,2\n", "not a trace", AZURE[0]])
def test_what_is_no_trace_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="trace"):
        trace_arrivals(text, Random(1))


def test_azure_rows_keep_their_hundred_nanoseconds() -> None:
    arrivals = azure_arrivals(AZURE)
    assert [a.prompt_tokens for a in arrivals] == [4808, 3180]
    assert arrivals[1].arrived_s == pytest.approx(0.052, abs=1e-7)
    with pytest.raises(ValueError, match="first line"):
        azure_arrivals(["a,b"])
    with pytest.raises(ValueError, match="line 2"):
        azure_arrivals([AZURE[0], "today,1,2"])


def test_rescaling_says_what_it_did() -> None:
    arrivals = [Arrival(arrived_s=float(at), prompt_tokens=10 * (at + 1), output_tokens=1) for at in range(100)]
    third = thinned(arrivals, 0.3, Random(0))
    assert 15 < len(third.arrivals) < 45
    assert set(third.arrivals) <= set(arrivals)
    assert f"{len(third.arrivals)} of 100" in third.note
    assert stretched(arrivals, 2.0).arrivals[-1].arrived_s == 198.0
    assert total_rate(at_rate(arrivals, 4.0).arrivals) == pytest.approx(4.0)
    assert [a.prompt_tokens for a in shrunk(arrivals[:2], 8).arrivals] == [1, 2]
    assert len(fitting(arrivals, 501).arrivals) == 50
    assert fitting(arrivals, 5000).note == ""


def flight(number: int, ttft_s: float, tpot_s: float, name: str = "", refused: bool = False) -> Flight:
    made = Flight(number, Arrival(arrived_s=float(number), prompt_tokens=1, output_tokens=11, request_class=name), OBJECTIVES, 0.0)
    made.refused = refused
    if not refused:
        made.first_token_s = number + ttft_s
        made.ended_s = made.first_token_s + 10 * tpot_s
    return made


def test_a_request_is_good_only_if_both_hold() -> None:
    flights = [flight(0, 0.5, 0.05, "a"), flight(1, 2.0, 0.05, "a"), flight(2, 0.5, 0.2, "b"), flight(3, 0.0, 0.0, "b", refused=True)]
    report = report_of(flights)
    assert (report.total.attained, report.total.ttft_attained, report.total.tpot_attained) == (0.25, 0.5, 0.5)
    assert report.total.refused == 1
    assert report.goodput_rps == pytest.approx(0.25)
    assert [each.attained for each in report.classes] == [0.5, 0.0]
    assert report.total.low < 0.25 < report.total.high


@given(st.integers(0, 50), st.integers(1, 50))
def test_the_interval_holds_the_share(good: int, more: int) -> None:
    low, high = wilson(good, good + more)
    assert 0.0 <= low <= good / (good + more) <= high <= 1.0


def test_percentiles_lie_between_values() -> None:
    assert percentile([1.0, 2.0, 4.0], 0.5) == 2.0
    assert percentile([1.0, 2.0, 4.0], 0.75) == 3.0
    assert percentile([7.0], 0.99) == 7.0


@given(st.floats(0.01, 300.0))
def test_the_knee_is_found_from_both_sides(limit: float) -> None:
    knee = find_knee(lambda rate: 1.0 if rate <= limit else 0.0)
    assert knee.rate <= limit < knee.rate * (1.0 + PRECISION) * 1.0001
    assert find_knee(lambda _: 0.0).rate == 0.0


def test_a_prefix_is_found_once_computed_and_the_least_used_goes() -> None:
    cache = SimulatedPrefixCache(4, 512)
    assert cache.cached_tokens((1, 2), 1000) == 0
    cache.computed((1, 2), 1000)
    assert cache.cached_tokens((1, 2), 1000) == 512
    cache.computed((1, 2), 1024)
    assert cache.cached_tokens((1, 2), 1024) == 1023
    cache.computed((5, 6, 7), 1536)
    assert cache.cached_tokens((1, 2), 2000) == 512
    assert cache.cached_tokens((5, 6, 7), 2000) == 1536
