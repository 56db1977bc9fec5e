"""Laws of the goodput simulator: closed form equals step by step, nothing is lost, causes come before effects."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.policy.admission import LatePolicy
from common.policy.placement import PlacementRule
from common.policy.prefill_queue import BatchLimits, PrefillOrder
from common.policy.step_time import DecodeLine, DecodeTime, PrefillTime, StepTime
from common.simulation.goodput.deployment import Deployment, Policies, TransferTime
from common.simulation.goodput.distserve_preset import KV_TOKENS, opt_13b
from common.simulation.goodput.flight import Arrival, Flight
from common.simulation.goodput.goodput_knee import find_knee
from common.simulation.goodput.goodput_report import GoodputReport, report_of
from common.simulation.goodput.goodput_simulator import GoodputSimulator
from common.simulation.goodput.workloads import Lengths, RequestClass, Workload
from common.values.objectives import Objectives

UNIT = 2.0**-16
"""Every time is a multiple of this power of two: sums are exact, so events that fall on one moment do so in both modes."""
TIME = StepTime(
    prefill=PrefillTime(base_s=512 * UNIT, per_token_s=16 * UNIT, per_pair_s=2 * UNIT),
    decode=DecodeTime(
        line=DecodeLine(base_s=1024 * UNIT, per_kv_token_s=UNIT, per_sequence_s=64 * UNIT),
        knee=4,
        beyond=DecodeLine(base_s=512 * UNIT, per_kv_token_s=2 * UNIT, per_sequence_s=128 * UNIT),
    ),
)
OBJECTIVES = {"": Objectives(ttft_s=1.0, tpot_s=0.05), "urgent": Objectives(ttft_s=0.1, tpot_s=0.03)}
ORDERS = st.sampled_from(["feasible_first", "edf", "shortest_first", "fcfs"])
RULES = st.sampled_from(["least_seconds", "power_of_two", "join_shortest_queue", "round_robin", "random"])
REQUESTS = st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 200), st.integers(1, 40), st.booleans()), min_size=1, max_size=25)


def arrivals_of(requests: list[tuple[int, int, int, bool]]) -> list[Arrival]:
    at, arrivals = 0, []
    for pause, prompt, output, urgent in requests:
        at += pause
        request_class = "urgent" if urgent else "calm"
        arrivals.append(Arrival(arrived_s=at * 16 * UNIT, prompt_tokens=prompt, output_tokens=output, request_class=request_class))
    return arrivals


def run(deployment: Deployment, arrivals: list[Arrival]) -> list[Flight]:
    return GoodputSimulator(deployment, OBJECTIVES, Random(0)).run(arrivals)


def check_laws(flights: list[Flight], arrivals: list[Arrival]) -> None:
    assert [flight.arrival for flight in flights] == arrivals
    for flight in flights:
        if flight.refused:
            assert flight.first_token_s is flight.ended_s is None
            continue
        assert flight.prefill_started_s is not None
        assert flight.first_token_s is not None
        assert flight.ended_s is not None
        prefill_s = TIME.prefill.chunk_s(flight.arrival.prompt_tokens)
        assert flight.arrival.arrived_s <= flight.prefill_started_s
        assert flight.first_token_s - flight.prefill_started_s >= prefill_s * (1.0 - 1e-9)
        least_s = min(TIME.decode.seconds(1, 0), TIME.decode.seconds(4, 0))
        assert flight.ended_s - flight.first_token_s >= (flight.arrival.output_tokens - 1) * least_s * (1.0 - 1e-9)
        if flight.decoding_s is not None:
            assert flight.first_token_s <= flight.decoding_s <= flight.ended_s


def times(flights: list[Flight]) -> list[tuple[float | None, ...]]:
    return [(f.prefill_started_s, f.first_token_s, f.decoding_s, f.ended_s) for f in flights]


@settings(max_examples=120, deadline=None)
@given(REQUESTS, ORDERS, RULES, st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), st.booleans(), st.sampled_from([None, 32]))
def test_split_in_closed_form_is_step_by_step_to_the_last_bit(
    requests: list[tuple[int, int, int, bool]],
    order: PrefillOrder,
    rule: PlacementRule,
    prefill: int,
    decode: int,
    transfer: int,
    tight: bool,
    chunk: int | None,
) -> None:
    arrivals = arrivals_of(requests)
    deployment = Deployment(
        prefill=prefill,
        decode=decode,
        step_time=TIME,
        kv_tokens=300 if tight else 10_000,
        max_sequences=3 if tight else 64,
        batch=BatchLimits(max_tokens=256),
        transfer=TransferTime(base_s=transfer * 8 * UNIT),
        policies=Policies(order=order, prefill_rule=rule, decode_rule=rule, chunk_tokens=chunk),
    )
    flights = run(deployment, arrivals)
    check_laws(flights, arrivals)
    assert times(flights) == times(run(replace(deployment, step_by_step=True), arrivals))


@settings(max_examples=80, deadline=None)
@example(
    requests=[(0, 21, 40, False), (0, 200, 40, False), (0, 1, 1, False)],
    order="feasible_first",
    shape=(0, 0, 1),
    tight=True,
    step_tokens=16,
)
@given(REQUESTS, ORDERS, st.sampled_from([(0, 0, 1), (0, 0, 3), (1, 1, 1)]), st.booleans(), st.sampled_from([16, 64]))
def test_colocated_in_closed_form_is_step_by_step(
    requests: list[tuple[int, int, int, bool]],
    order: PrefillOrder,
    shape: tuple[int, int, int],
    tight: bool,
    step_tokens: int,
) -> None:
    arrivals = arrivals_of(requests)
    deployment = Deployment(
        prefill=shape[0],
        decode=shape[1],
        both=shape[2],
        step_time=TIME,
        kv_tokens=300 if tight else 10_000,
        max_sequences=3 if tight else 64,
        step_tokens=step_tokens,
        policies=Policies(order=order, prefill_rule="round_robin", decode_rule="round_robin"),
    )
    flights = run(deployment, arrivals)
    check_laws(flights, arrivals)
    assert times(flights) == times(run(replace(deployment, step_by_step=True), arrivals))


@settings(max_examples=60, deadline=None)
@given(REQUESTS, st.sampled_from([None, "refuse", "best_effort"]), st.booleans())
def test_free_placement_and_admission_lose_nothing_and_are_step_by_step(
    requests: list[tuple[int, int, int, bool]], late: LatePolicy | None, tight: bool
) -> None:
    arrivals = arrivals_of(requests)
    policies = Policies(free=True, late=late)
    kv_tokens = 300 if tight else 10_000
    deployment = Deployment(prefill=2, decode=2, step_time=TIME, kv_tokens=kv_tokens, step_tokens=64, policies=policies)
    flights = run(deployment, arrivals)
    check_laws(flights, arrivals)
    assert times(flights) == times(run(replace(deployment, step_by_step=True), arrivals))
    if late != "refuse":
        assert not any(flight.refused for flight in flights)


MIX = {"W1": (256, 64, 0.93), "W2": (1024, 64, 3.9), "W3": (64, 128, 0.34)}
SMALL_CPU = StepTime(
    prefill=PrefillTime(base_s=0.02, per_token_s=6.2e-4, per_pair_s=2.2e-7),
    decode=DecodeTime(line=DecodeLine(base_s=0.0255, per_kv_token_s=1e-6, per_sequence_s=9e-4)),
)


def test_feasible_first_carries_half_as_much_again_as_first_come_first_served() -> None:
    """One prefill worker, a mix of short and long prompts with objectives of their own: 90 % of every class is good at 1.5 times
    the rate at which first come first served still has 90 % of all, whole prompts or chunks."""
    rng = Random(7)
    names = rng.choices(list(MIX), [50, 20, 30], k=2500)
    pauses = [rng.expovariate(1.0) for _ in names]
    objectives = {name: Objectives(ttft_s=ttft_s, tpot_s=0.077) for name, (_, _, ttft_s) in MIX.items()}

    def report(order: PrefillOrder, rate: float) -> GoodputReport:
        at, arrivals = 0.0, []
        for name, pause in zip(names, pauses, strict=True):
            at += pause / rate
            arrivals.append(Arrival(arrived_s=at, prompt_tokens=MIX[name][0], output_tokens=MIX[name][1], request_class=name))
        policies = Policies(order=order, chunk_tokens=256)
        deployment = Deployment(prefill=1, decode=4, step_time=SMALL_CPU, batch=BatchLimits(max_tokens=256), policies=policies)
        return report_of(GoodputSimulator(deployment, objectives, Random(0)).run(arrivals))

    knee = find_knee(lambda rate: report("fcfs", rate).total.attained)
    ours = report("feasible_first", 1.5 * knee.rate)
    assert [each.name for each in ours.classes] == ["W1", "W2", "W3"]
    assert min(each.attained for each in ours.classes) >= 0.9


def test_under_overload_admission_makes_more_requests_good_and_keeps_its_promises() -> None:
    prompt, output = Lengths(mean=755.0, sigma=1.0, most=2000), Lengths(mean=200.0, sigma=0.9, most=4096)
    objectives = Objectives(ttft_s=0.25, tpot_s=0.1)
    workload = Workload(classes=(RequestClass(name="", prompt=prompt, output=output, objectives=objectives),))
    arrivals = workload.draw(2000, 13.0, Random(4))

    def flights(late: LatePolicy | None) -> list[Flight]:
        deployment = Deployment(prefill=1, decode=2, step_time=opt_13b(), kv_tokens=KV_TOKENS, policies=Policies(late=late))
        return GoodputSimulator(deployment, workload.objectives, Random(0)).run(arrivals)

    without = report_of(flights(None)).total.attained
    admitting = flights("refuse")
    assert report_of(admitting).total.attained >= without + 0.1
    assert report_of([flight for flight in admitting if not flight.refused]).total.attained >= 0.95


def test_a_lone_request_takes_exactly_what_the_model_says() -> None:
    arrivals = [Arrival(arrived_s=1.0, prompt_tokens=100, output_tokens=3)]
    (flight,) = run(Deployment(prefill=1, decode=1, step_time=TIME, transfer=TransferTime(base_s=0.5)), arrivals)
    assert flight.first_token_s == pytest.approx(1.0 + TIME.prefill.seconds(100))
    decode_s = TIME.decode.seconds(1, 101) + TIME.decode.seconds(1, 102)
    assert flight.ended_s == pytest.approx(1.0 + TIME.prefill.seconds(100) + 0.5 + decode_s)
    assert flight.split


def test_what_can_never_fit_is_said_at_once() -> None:
    with pytest.raises(ValueError, match="never fits"):
        run(Deployment(prefill=1, decode=1, step_time=TIME, kv_tokens=50), [Arrival(arrived_s=0.0, prompt_tokens=60, output_tokens=1)])


def test_free_placement_is_not_behind_the_strict_split_where_prompts_are_long() -> None:
    """A prefill worker that may keep streams computes batches and long prompts as one that never does."""
    prompt, output = Lengths(mean=2048.0, sigma=1.0, most=8000), Lengths(mean=28.0, sigma=1.0, most=4096)
    objectives = Objectives(ttft_s=2.0, tpot_s=0.1)
    workload = Workload(classes=(RequestClass(name="", prompt=prompt, output=output, objectives=objectives),))
    arrivals = workload.draw(1500, 29.0, Random(0))

    def attained(free: bool) -> float:
        policies = Policies(free=free)
        deployment = Deployment(prefill=6, decode=2, step_time=opt_13b(), kv_tokens=KV_TOKENS, policies=policies)
        return report_of(GoodputSimulator(deployment, workload.objectives, Random(0)).run(arrivals)).total.attained

    assert attained(free=True) >= max(0.9, attained(free=False) - 0.01)
