"""Where a phase of a request goes, whether it is split at all, and whether it is taken."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.policy.admission import Admitted, DecodeOutlook, PrefillOutlook, Refused, ServedLate, decide_admission, predict_speed
from common.policy.free_placement import (
    StayQuestion,
    StreamLoad,
    chooses_beside,
    prefill_beside,
    stays,
    stream_slack_s,
)
from common.policy.output_length import OutputLengths
from common.policy.placement import PlacementRule, choose_site, decode_cost_s, prefill_cost_s
from common.policy.step_time import Chunk, DecodeLine, DecodeTime, PrefillTime, StepTime
from common.values.objectives import Objectives

PREFILL = PrefillTime(base_s=0.02, per_token_s=1e-3)
DECODE = DecodeTime(line=DecodeLine(base_s=0.02, per_kv_token_s=1e-6, per_sequence_s=1e-3))
TIME = StepTime(prefill=PREFILL, decode=DECODE)
OBJECTIVES = Objectives(ttft_s=1.0, tpot_s=0.05)


def chosen(rule: PlacementRule, costs: list[float], waiting: list[int], turn: int = 0, seed: int = 0) -> int:
    return choose_site(rule, len(costs), cost=costs.__getitem__, waiting=waiting.__getitem__, turn=turn, draws=random.Random(seed))


def test_each_rule_looks_at_what_it_looks_at() -> None:
    costs, waiting = [3.0, 1.0, 2.0], [2, 5, 0]
    assert chosen("least_seconds", costs, waiting) == 1
    assert chosen("least_seconds", [1.04, 1.0, 2.0], [2, 5, 0]) == 0, "alike, and fewer wait there"
    assert chosen("join_shortest_queue", costs, waiting) == 2
    assert [chosen("round_robin", costs, waiting, turn) for turn in range(4)] == [0, 1, 2, 0]
    assert {chosen("random", costs, waiting, seed=seed) for seed in range(30)} == {0, 1, 2}
    with pytest.raises(ValueError, match="no site"):
        chosen("random", [], [])


@given(st.integers(0, 1000), st.permutations(range(4)))
def test_power_of_two_never_takes_the_worst_and_asks_twice(seed: int, ranks: list[int]) -> None:
    asked = []

    def cost(site: int) -> float:
        asked.append(site)
        return float(ranks[site])

    site = choose_site("power_of_two", 4, cost=cost, waiting=lambda _: 0, turn=0, draws=random.Random(seed))
    assert ranks[site] != 3
    assert len(set(asked)) == 2
    assert site == min(asked, key=lambda each: ranks[each])


def test_a_prefix_is_worth_as_much_queue_as_it_saves() -> None:
    def cost(queue_s: float, cached: int) -> float:
        return prefill_cost_s(PREFILL, queue_s=queue_s, prompt_tokens=1000, cached_tokens=cached)

    assert cost(0.7, 800) < cost(0.0, 0) < cost(0.9, 800)
    assert cost(0.0, 1000) == pytest.approx(PREFILL.seconds(1, 999))


def test_decode_goes_where_steps_are_short_and_there_is_room() -> None:
    def cost(sequences: int, room: float, kv: float = 8000.0) -> float:
        return decode_cost_s(DECODE, sequences=sequences, kv_tokens=kv, context_tokens=500, output_tokens=100.0, room_tokens=room)

    assert cost(3, 10_000) < cost(9, 10_000)
    assert cost(3, 0) > cost(3, 600)
    assert cost(0, 100, kv=0.0) == math.inf


def test_a_prompt_goes_beside_streams_that_have_slack_and_not_else() -> None:
    load = StreamLoad(sequences=4, kv_tokens=2000, slack_s=0.5)
    beside = prefill_beside(TIME, load, tokens=300, past=0, step_tokens=104)
    decode_s = DECODE.seconds(4, 2000)
    assert beside.ttft_s == pytest.approx(beside.damage_s + 3 * decode_s)
    assert beside.damage_s == pytest.approx(PREFILL.chunk_s(300))
    chunks = [Chunk(tokens=100, past=past) for past in (0, 100, 200)]
    assert beside.ttft_s == pytest.approx(sum(TIME.mixed_s([chunk], 4, 2000) for chunk in chunks))
    assert chooses_beside(beside, load, elsewhere_s=2.0, objective_s=1.0, fits=True)
    assert not chooses_beside(beside, load, elsewhere_s=0.1, objective_s=0.05, fits=True), "the queue is sooner"
    assert not chooses_beside(beside, load, elsewhere_s=0.9, objective_s=1.0, fits=True), "it is on time there, and slows nobody down"
    assert not chooses_beside(beside, load, elsewhere_s=2.0, objective_s=0.3, fits=True), "it is late here too"
    assert not chooses_beside(beside, load, elsewhere_s=2.0, objective_s=1.0, fits=False)
    tight = StreamLoad(sequences=4, kv_tokens=2000, slack_s=0.1)
    assert not chooses_beside(beside, tight, elsewhere_s=2.0, objective_s=1.0, fits=True)
    idle = StreamLoad(sequences=0, kv_tokens=0, slack_s=math.inf)
    alone = prefill_beside(TIME, idle, tokens=300, past=0, step_tokens=300)
    assert chooses_beside(alone, idle, elsewhere_s=0.5, objective_s=1.0, fits=True)


def test_slack_is_what_is_left_of_the_objective() -> None:
    assert stream_slack_s(tpot_s=0.05, decoded=10, spent_s=0.3, left=10, step_s=0.02) == pytest.approx(0.5)


def test_a_request_stays_only_where_the_decode_side_is_the_bottleneck() -> None:
    here = StreamLoad(sequences=0, kv_tokens=0, slack_s=math.inf)

    def question(**changes: float) -> StayQuestion:
        fields = {"there_tpot_s": 0.08, "output_tokens": 50.0, "room_tokens": 1000.0, "prompt_slack_s": 2.0}
        return StayQuestion(tpot_s=0.05, context_tokens=100, **(fields | changes))

    assert stays(TIME, here, question())
    assert not stays(TIME, here, question(there_tpot_s=0.04))
    assert not stays(TIME, here, question(room_tokens=120.0))
    assert not stays(TIME, here, question(prompt_slack_s=0.0)), "prompts here would be late"
    busy = StreamLoad(sequences=40, kv_tokens=4000, slack_s=10.0)
    assert not stays(TIME, busy, question()), "no better here"


def test_lengths_are_learnt_by_class_and_bounded_by_the_request() -> None:
    lengths = OutputLengths(classes=2)
    assert lengths.predicted("chat", 100) == 50.0
    for _ in range(10):
        lengths.observe("chat", 20)
    assert lengths.predicted("chat", 100) == pytest.approx(20.0)
    assert lengths.predicted("chat", 8) == 8.0
    assert lengths.predicted("chat", 100, made=30) == 60.0
    assert lengths.predicted("code", 100) == 50.0


def outlook(queue_s: float = 0.0, sequences: float = 4, **changes: float) -> tuple[PrefillOutlook, DecodeOutlook]:
    prefill = PrefillOutlook(queue_s=queue_s, work_s=0.2, utilisation=changes.get("utilisation", 0.0))
    joins = changes.get("joins_per_s", 0.0)
    return prefill, DecodeOutlook(sequences=sequences, kv_tokens=500 * sequences, left_s=5.0, joins_per_s=joins)


def test_what_can_be_good_is_admitted_and_what_cannot_is_told_when() -> None:
    assert isinstance(decide_admission(DECODE, *outlook(), OBJECTIVES, context_tokens=200, late="refuse"), Admitted)
    late = decide_admission(DECODE, *outlook(queue_s=5.8), OBJECTIVES, context_tokens=200, late="best_effort")
    assert isinstance(late, ServedLate)
    idle = decide_admission(DECODE, *outlook(queue_s=5.8), OBJECTIVES, context_tokens=200, late="refuse")
    assert isinstance(idle, Refused)
    assert idle.retry_after_s == 5.0
    busy = decide_admission(DECODE, *outlook(queue_s=5.8, utilisation=0.5), OBJECTIVES, context_tokens=200, late="refuse")
    assert isinstance(busy, Refused)
    assert busy.retry_after_s == 10.0


def test_too_many_streams_are_waited_for_until_enough_have_left() -> None:
    prefill, decode = outlook(sequences=60)
    refused = decide_admission(DECODE, prefill, decode, OBJECTIVES, context_tokens=200, late="refuse")
    assert isinstance(refused, Refused)
    later = decode.after(refused.retry_after_s)
    assert predict_speed(DECODE, prefill, later, context_tokens=200).tpot_s <= OBJECTIVES.tpot_s
    hopeless = decide_admission(DECODE, *outlook(sequences=60, joins_per_s=20.0), OBJECTIVES, context_tokens=200, late="refuse")
    assert isinstance(hopeless, Refused)
    assert hopeless.retry_after_s == 60.0


@given(st.floats(0.0, 100.0), st.floats(0.0, 50.0), st.floats(0.0, 50.0))
def test_the_outlook_tends_to_what_joins_and_composes(sequences: float, one: float, two: float) -> None:
    decode = DecodeOutlook(sequences=sequences, kv_tokens=100 * sequences, left_s=5.0, joins_per_s=2.0)
    assert decode.after(one).after(two).sequences == pytest.approx(decode.after(one + two).sequences)
    assert decode.after(1000.0).sequences == pytest.approx(10.0)
