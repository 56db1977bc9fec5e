"""Keys of a class: who gives way, what is kept, and what a greedy key costs the others."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.policy.fair_share import OUTPUT_WEIGHT, FairShare
from common.policy.prefill_queue import BatchLimits
from common.policy.step_time import DecodeLine, DecodeTime, PrefillTime, StepTime
from common.simulation.goodput.deployment import Deployment, Policies
from common.simulation.goodput.flight import Arrival
from common.simulation.goodput.goodput_report import report_of
from common.simulation.goodput.goodput_simulator import GoodputSimulator
from common.values.objectives import Objectives

TIME = StepTime(
    prefill=PrefillTime(base_s=0.01, per_token_s=2e-4),
    decode=DecodeTime(line=DecodeLine(base_s=0.01, per_kv_token_s=1e-8, per_sequence_s=1e-4)),
)


def test_alone_a_key_never_gives_way() -> None:
    shares = FairShare(100.0)
    assert not any(shares.begin("a", 1000, 0.0) for _ in range(5))


def test_who_has_had_far_more_gives_way_until_it_has_faded() -> None:
    shares = FairShare(100.0)
    shares.begin("b", 100, 0.0)
    assert not shares.begin("a", 1000, 0.0), "it had nothing before"
    assert shares.begin("a", 10, 1.0)
    assert not shares.begin("b", 10, 1.0)
    shares.end("b", int(1000 / OUTPUT_WEIGHT), 2.0)
    assert not shares.begin("a", 10, 2.0), "the other has had as much"


def test_equal_keys_do_not_give_way() -> None:
    shares = FairShare(100.0)
    gave_way = [shares.begin(key, 200, float(at)) for at in range(200) for key in "abc"]
    assert not any(gave_way)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 500), st.integers(0, 50)), max_size=60))
def test_who_has_been_away_is_forgotten(requests: list[tuple[str, int, int]]) -> None:
    shares = FairShare(200.0)
    for at, (key, prompt, output) in enumerate(requests):
        shares.begin(key, prompt, 0.1 * at)
        shares.end(key, output, 0.1 * at + 0.05)
    assert len(shares) == len({key for key, _, _ in requests})
    shares.begin("new", 1, 1000.0)
    assert len(shares) == 1


def attained_by_the_others(greed: float, allowance: float | None) -> float:
    """Nine keys want 8 % of the prefill worker each, the tenth `greed` times that."""
    rng, arrivals = Random(5), []
    rate = 0.08 / TIME.prefill.seconds(300)
    for number in range(10):
        at, of_key = 0.0, rate * (greed if number == 9 else 1.0)
        while (at := at + rng.expovariate(of_key)) < 120.0:
            arrivals.append(Arrival(arrived_s=at, prompt_tokens=300, output_tokens=20, key=f"k{number}"))
    arrivals.sort(key=lambda arrival: arrival.arrived_s)
    policies = Policies(share_allowance=allowance)
    deployment = Deployment(prefill=1, decode=2, step_time=TIME, batch=BatchLimits(max_tokens=600), policies=policies)
    flights = GoodputSimulator(deployment, {"": Objectives(ttft_s=0.8, tpot_s=0.1)}, Random(0)).run(arrivals)
    return report_of([flight for flight in flights if flight.arrival.key != "k9"]).total.attained


def test_a_key_at_ten_times_its_share_costs_the_others_at_most_two_points() -> None:
    peace = attained_by_the_others(1.0, None)
    assert peace > 0.95
    assert attained_by_the_others(10.0, 2000.0) >= peace - 0.02
    assert attained_by_the_others(10.0, None) < peace - 0.1, "without shares it costs them more"


def test_an_allowance_is_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        FairShare(0.0)
