"""Laws of roles that change while the simulation serves: nothing is lost or made twice, closed form equals step by step."""

from dataclasses import replace
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from common.policy.prefill_queue import BatchLimits
from common.policy.step_time import DecodeLine, DecodeTime, PrefillTime, StepTime
from common.simulation.goodput.deployment import Deployment, Policies, TransferTime
from common.simulation.goodput.flight import Arrival, Flight
from common.simulation.goodput.goodput_simulator import GoodputSimulator, Look
from common.values.objectives import Objectives

UNIT = 2.0**-16
"""Sums of times are exact, so that events of one moment fall on it in both modes."""
TIME = StepTime(
    prefill=PrefillTime(base_s=512 * UNIT, per_token_s=16 * UNIT, per_pair_s=2 * UNIT),
    decode=DecodeTime(line=DecodeLine(base_s=1024 * UNIT, per_kv_token_s=UNIT, per_sequence_s=64 * UNIT)),
)
OBJECTIVES = {"": Objectives(ttft_s=1.0, tpot_s=0.05)}
REQUESTS = st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 200), st.integers(1, 40)), min_size=1, max_size=25)
PREFILL, DECODE = 2, 2


def run(deployment: Deployment, arrivals: list[Arrival], turns: list[int]) -> list[Flight]:
    """At each look the named worker turns to the other role, where that leaves one of each."""
    simulator = GoodputSimulator(deployment, OBJECTIVES, Random(0))
    left = list(turns)

    def look(now: float) -> None:
        if not left:
            return
        number = left.pop()
        prefill = [each for each in range(PREFILL + DECODE) if simulator.is_prefill(each)]
        if number in prefill and len(prefill) > 1:
            simulator.change_role(number, "decode", now)
        elif number not in prefill and len(prefill) < PREFILL + DECODE - 1:
            simulator.change_role(number, "prefill", now)

    return simulator.run(arrivals, Look(look, 1000 * UNIT))


@settings(max_examples=150, deadline=None)
@given(REQUESTS, st.lists(st.integers(0, PREFILL + DECODE - 1), max_size=30), st.booleans(), st.booleans(), st.integers(0, 3))
def test_role_changes_lose_nothing_and_are_step_by_step(
    requests: list[tuple[int, int, int]], turns: list[int], free: bool, tight: bool, transfer: int
) -> None:
    at, arrivals = 0, []
    for pause, prompt, output in requests:
        at += pause
        arrivals.append(Arrival(arrived_s=at * 16 * UNIT, prompt_tokens=prompt, output_tokens=output))
    deployment = Deployment(
        prefill=PREFILL,
        decode=DECODE,
        step_time=TIME,
        kv_tokens=300 if tight else 10_000,
        max_sequences=3 if tight else 64,
        batch=BatchLimits(max_tokens=256),
        transfer=TransferTime(base_s=transfer * 8 * UNIT),
        policies=Policies(free=free),
        changeable=True,
    )
    flights = run(deployment, arrivals, turns)
    for flight in flights:
        assert flight.first_token_s is not None
        assert flight.ended_s is not None
        least_s = TIME.decode.seconds(1, 0)
        assert flight.first_token_s > flight.arrival.arrived_s
        assert flight.ended_s - flight.first_token_s >= (flight.arrival.output_tokens - 1) * least_s * (1.0 - 1e-9)
    times = [(f.first_token_s, f.ended_s, f.decoded_steps) for f in flights]
    stepped = run(replace(deployment, step_by_step=True), arrivals, turns)
    assert times == [(f.first_token_s, f.ended_s, f.decoded_steps) for f in stepped]
