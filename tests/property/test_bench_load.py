"""Laws of `segue bench`: schedules, quantiles and intervals, verdicts, and the sweep that looks for the knee."""

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tools.bench_load.arrivals import Constant, Gamma, Poisson, closed_loop, open_loop
from tools.bench_load.goodput import attainment, fluidity
from tools.bench_load.knee import RatePoint, find_knee, next_rate
from tools.bench_load.quantiles import bootstrap, quantile, summarise, wilson
from tools.bench_load.request_class import MIX, Objective, parse_mix
from tools.bench_load.request_result import RequestResult
from tools.bench_load.svg_plot import ticks

ARRIVALS = st.one_of(st.just(Poisson()), st.just(Constant()), st.floats(0.3, 5.0).map(Gamma))
CLASSES = parse_mix(MIX)


@given(ARRIVALS, st.floats(0.05, 50.0), st.integers(1, 60), st.integers(0, 10), st.integers(0, 10**6))
def test_a_schedule_is_ordered_complete_and_its_seeds(
    arrivals: Poisson | Gamma | Constant, rate: float, count: int, warmup: int, seed: int
) -> None:
    planned = open_loop(CLASSES, arrivals, rate=rate, count=count, warmup=warmup, seed=seed)
    times = [one.at_s or 0.0 for one in planned]
    assert times == sorted(times)
    assert times[0] == 0.0
    assert [one.number for one in planned] == list(range(count + warmup))
    assert sum(one.measured for one in planned) == count
    assert planned == open_loop(CLASSES, arrivals, rate=rate, count=count, warmup=warmup, seed=seed)
    faster = open_loop(CLASSES, arrivals, rate=2 * rate, count=count, warmup=warmup, seed=seed)
    assert [one.kind for one in faster] == [one.kind for one in planned], "the rate changes when, never what"
    assert all(fast.at_s == 0.0 or (fast.at_s or 0.0) <= slow for fast, slow in zip(faster, times, strict=True))


@given(st.integers(1, 50), st.integers(0, 9), st.integers(0, 1000))
def test_a_closed_loop_plans_as_many(count: int, warmup: int, seed: int) -> None:
    planned = closed_loop(CLASSES, count=count, warmup=warmup, seed=seed)
    assert sum(one.measured for one in planned) == count
    assert all(one.at_s is None for one in planned)


def test_long_schedules_have_the_rate_and_the_burstiness_they_were_asked_for() -> None:
    for arrivals, variation in ((Poisson(), 1.0), (Gamma(0.5), 0.5), (Gamma(3.0), 3.0)):
        planned = open_loop(CLASSES, arrivals, rate=4.0, count=20_000, warmup=0, seed=1)
        times = [one.at_s or 0.0 for one in planned]
        gaps = summarise([later - earlier for earlier, later in pairwise(times)])
        assert gaps is not None
        assert abs(gaps.mean * 4.0 - 1.0) < 5 * variation / 20_000**0.5
        assert abs(gaps.deviation / gaps.mean - variation) < 0.1 * variation


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 1), st.floats(0, 1))
def test_quantiles_rise_and_stay_inside(values: list[float], one: float, other: float) -> None:
    ordered = sorted(values)
    low, high = sorted((quantile(ordered, one), quantile(ordered, other)))
    assert quantile(ordered, min(one, other)) <= quantile(ordered, max(one, other)) + 1e-6
    assert ordered[0] - 1e-6 <= low <= high <= ordered[-1] + 1e-6


@given(st.integers(1, 500).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilsons_interval_holds_the_share_and_narrows(counted: tuple[int, int]) -> None:
    good, total = counted
    interval, wider = wilson(good, total), wilson(good, total, z=3.0)
    assert 0.0 <= wider.low <= interval.low <= good / total <= interval.high <= wider.high <= 1.0
    more = wilson(good * 4, total * 4)
    assert more.high - more.low <= interval.high - interval.low + 1e-12


@given(st.lists(st.floats(0, 100), min_size=2, max_size=40))
def test_a_bootstrapped_interval_lies_within_the_sample(values: list[float]) -> None:
    interval = bootstrap(values, max, random.Random(1), resamples=50)
    assert min(values) <= interval.low <= interval.high <= max(values)


ARRIVED = st.lists(st.floats(0.0, 2.0), min_size=1, max_size=20)


def _result(number: int, waits: list[float]) -> RequestResult:
    at, arrivals = 0.0, []
    for wait in waits:
        at += wait
        arrivals.append(at)
    return RequestResult(
        number=number,
        kind="W1",
        measured=True,
        scheduled_s=0.0,
        sent_s=0.0,
        ended_s=at,
        arrivals_s=tuple(arrivals),
        planned_prompt_tokens=1,
        planned_output_tokens=len(arrivals),
        prompt_tokens=1,
        output_tokens=len(arrivals),
    )


@given(st.lists(ARRIVED, min_size=1, max_size=12), st.floats(0.01, 3.0), st.floats(0.01, 1.0))
def test_a_looser_objective_never_makes_fewer_good(waits: list[list[float]], ttft: float, tpot: float) -> None:
    results = [_result(number, each) for number, each in enumerate(waits)]
    strict, loose = Objective(ttft_s=ttft, tpot_s=tpot), Objective(ttft_s=ttft * 2, tpot_s=tpot * 2)
    narrow, wide = attainment(results, {"W1": strict}), attainment(results, {"W1": loose})
    assert narrow.good <= min(narrow.ttft_good, narrow.tpot_good) <= narrow.requests == len(results)
    assert narrow.good <= wide.good
    assert narrow.interval.low <= narrow.share <= narrow.interval.high
    for result in results:
        assert 0.0 <= fluidity(result, strict) <= 1.0
        if all(wait <= strict.tpot_s for wait in result.gaps_s) and (result.ttft_s or 0.0) <= strict.ttft_s:
            assert fluidity(result, strict) == 1.0


@given(st.floats(0.02, 50.0), st.floats(0.5, 4.0), st.floats(0.02, 0.3))
def test_the_sweep_ends_and_brackets_any_knee(knee: float, first: float, precision: float) -> None:
    """A server that is perfect up to its knee and useless beyond."""
    points: list[RatePoint] = []
    while (rate := next_rate(points, target=0.9, first=first, precision=precision)) is not None:
        points.append(RatePoint(rate=rate, real_rate=rate, good=100 if rate <= knee else 0, total=100))
        assert len(points) < 25
    good = [point.rate for point in points if point.good]
    bad = [point.rate for point in points if not point.good]
    if good and bad:
        assert max(good) <= knee < min(bad) <= max(good) * (1 + precision) + 1e-4
        found = find_knee(points, 0.9, random.Random(1), resamples=20)
        assert found is not None
        assert max(good) <= found.rate <= min(bad)


@given(st.floats(-1e5, 1e5), st.floats(1e-3, 1e5))
def test_ticks_lie_on_the_axis(low: float, width: float) -> None:
    shown = ticks(low, low + width)
    assert 1 <= len(shown) <= 7
    assert all(low - width * 1e-3 <= value <= low + width * 1.001 for value in shown)
