"""Which prompt is next: literal queues, and the laws that hold for every order."""

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.policy.prefill_preemption import Interrupted, chunk_tokens_for, preempts
from common.policy.prefill_queue import BatchLimits, PrefillOrder, PrefillQueue
from common.policy.queued_prompt import QueuedPrompt
from common.policy.step_time import PrefillTime
from common.values.errors import InvariantBroken
from common.values.objectives import Objectives, Speed

TIME = PrefillTime(base_s=0.0, per_token_s=0.01)
ONE = BatchLimits(max_tokens=1, max_prompts=1)
ORDERS: tuple[PrefillOrder, ...] = ("feasible_first", "edf", "shortest_first", "fcfs")


def prompt(handle: int, tokens: int, deadline: float, arrived_at: float = 0.0) -> QueuedPrompt:
    return QueuedPrompt(handle=handle, tokens=tokens, arrived_at=arrived_at, deadline=deadline, work_s=TIME.seconds(tokens))


def queue(*prompts: QueuedPrompt, order: PrefillOrder = "feasible_first", limits: BatchLimits = ONE) -> PrefillQueue:
    made = PrefillQueue(order, TIME, limits)
    for each in prompts:
        made.push(each)
    return made


def served(waiting: PrefillQueue, now: float = 0.0) -> list[int]:
    """Handles in the order in which a worker that does nothing else computes them."""
    handles = []
    while batch := waiting.next_batch(now):
        handles += [each.handle for each in batch]
        now += sum(each.work_s for each in batch)
    return handles


def on_time(prompts: list[QueuedPrompt], handles: list[int]) -> int:
    now, good = 0.0, 0
    for handle in handles:
        now += prompts[handle].work_s
        good += now <= prompts[handle].deadline
    return good


def test_each_order_is_its_own() -> None:
    three = (prompt(0, 30, 9.0, 0.0), prompt(1, 10, 5.0, 1.0), prompt(2, 20, 3.0, 2.0))
    assert served(queue(*three, order="fcfs"), 3.0)[:1] == [0]
    assert served(queue(*three, order="shortest_first"))[:1] == [1]
    assert served(queue(*three, order="edf"))[:1] == [2]
    assert served(queue(*three)) == [2, 1, 0]


def test_who_is_late_goes_last_and_by_arrival() -> None:
    late, later = prompt(0, 100, 0.5, arrived_at=-2.0), prompt(1, 50, 0.1, arrived_at=-1.0)
    assert served(queue(later, late, prompt(2, 10, 9.0))) == [2, 0, 1]


def test_where_not_all_can_be_on_time_the_longest_waits() -> None:
    """Earliest deadline first would start the long one and make all late."""
    prompts = [prompt(0, 100, 1.0), prompt(1, 20, 1.1), prompt(2, 20, 1.1), prompt(3, 20, 1.1)]
    assert on_time(prompts, served(queue(*prompts))) == 3
    assert on_time(prompts, served(queue(*prompts, order="edf"))) == 1


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0.05, 2.0)), min_size=1, max_size=6))
def test_as_many_are_on_time_as_any_order_could_make(shapes: list[tuple[int, float]]) -> None:
    prompts = [prompt(handle, tokens, deadline) for handle, (tokens, deadline) in enumerate(shapes)]
    best = max(on_time(prompts, list(order)) for order in permutations(range(len(prompts))))
    assert on_time(prompts, served(queue(*prompts))) == best


@given(
    st.sampled_from(ORDERS),
    st.lists(st.tuples(st.integers(1, 300), st.floats(0.0, 3.0), st.booleans()), max_size=20),
    st.integers(1, 400),
)
def test_none_is_lost_doubled_or_dropped(order: PrefillOrder, shapes: list[tuple[int, float, bool]], most: int) -> None:
    waiting = PrefillQueue(order, TIME, BatchLimits(max_tokens=most))
    expected = set()
    for handle, (tokens, deadline, cancelled) in enumerate(shapes):
        waiting.push(prompt(handle, tokens, deadline))
        if cancelled:
            removed = waiting.remove(handle)
            assert removed is not None
            assert removed.handle == handle
        else:
            expected.add(handle)
    assert waiting.tokens == sum(each.tokens for each in waiting.waiting())
    now, seen = 0.0, list[int]()
    while batch := waiting.next_batch(now):
        assert len(batch) == 1 or sum(each.tokens for each in batch) <= most
        seen += [each.handle for each in batch]
        now += sum(each.work_s for each in batch)
    assert sorted(seen) == sorted(expected)
    assert (len(waiting), waiting.tokens) == (0, 0)
    assert waiting.work_s == pytest.approx(0.0, abs=1e-9)


def test_a_late_prompt_is_served_though_prompts_that_can_be_on_time_never_end() -> None:
    waiting = queue(prompt(0, 100, 0.5))
    now = 0.0
    for handle in range(1, 200):
        waiting.push(prompt(handle, 10, now + 1.0, arrived_at=now))
        (next_one,) = waiting.next_batch(now)
        now += next_one.work_s
        if next_one.handle == 0:
            break
    else:
        pytest.fail("starved")
    assert handle > 90, "its share is a tenth"


def test_a_batch_fills_up_to_its_limit_and_never_makes_a_member_late() -> None:
    limits = BatchLimits(max_tokens=100)
    roomy = [prompt(handle, 40, 9.0) for handle in range(3)]
    assert len(queue(*roomy, limits=limits).next_batch(0.0)) == 2
    tight = [prompt(0, 40, 0.5), prompt(1, 40, 9.0)]
    assert [each.handle for each in queue(*tight, limits=limits).next_batch(0.0)] == [0]
    assert [each.handle for each in queue(prompt(0, 500, 9.0), limits=limits).next_batch(0.0)] == [0]


def test_what_is_ahead_depends_on_the_order() -> None:
    three = (prompt(0, 30, 9.0, 0.0), prompt(1, 10, 5.0, 1.0), prompt(2, 200, 0.5, 2.0))
    new = prompt(3, 20, 6.0, 3.0)
    ahead = {order: queue(*three, order=order) for order in ORDERS}
    assert ahead["fcfs"].ahead_s(new, 0.0) == pytest.approx(2.4)
    assert ahead["edf"].ahead_s(new, 0.0) == pytest.approx(2.1)
    assert ahead["shortest_first"].ahead_s(new, 0.0) == pytest.approx(0.1)
    late_apart = ahead["feasible_first"]
    late_apart.peek(0.0)
    assert late_apart.ahead_s(new, 0.0) == pytest.approx(0.1 * 1.1), "the late one is overtaken, but for its share"
    assert late_apart.ahead_s(prompt(4, 30, 0.2, 3.0), 0.0) == pytest.approx(2.4), "late too: behind all"


def test_a_prompt_is_queued_once() -> None:
    waiting = queue(prompt(0, 1, 1.0))
    with pytest.raises(InvariantBroken):
        waiting.push(prompt(0, 1, 1.0))
    assert waiting.remove(7) is None


def test_an_urgent_prompt_goes_between_chunks_only_where_it_gains() -> None:
    long_one = Interrupted(rest_tokens=300, past=100, deadline=9.0)
    urgent = prompt(1, 20, 1.0)
    assert preempts(long_one, urgent, TIME, 100, 0.0)
    assert not preempts(long_one, prompt(1, 20, 5.0), TIME, 100, 0.0), "it can wait"
    assert not preempts(long_one, prompt(1, 200, 1.0), TIME, 100, 0.0), "it is late either way"
    just = Interrupted(rest_tokens=300, past=100, deadline=3.1)
    assert not preempts(just, urgent, TIME, 100, 0.0), "one of two: the running one"
    lost = Interrupted(rest_tokens=300, past=100, deadline=1.0)
    assert preempts(lost, urgent, TIME, 100, 0.0)


def test_chunks_are_as_long_as_an_urgent_prompt_may_wait() -> None:
    time = PrefillTime(base_s=0.02, per_token_s=1e-3, per_pair_s=1e-7)
    chunk = chunk_tokens_for(time, 0.3)
    assert time.seconds(chunk) <= 0.3 < time.seconds(chunk + 1)
    assert chunk_tokens_for(time, 0.0) == time.saturation_tokens // 8


def test_an_objective_may_grow_with_the_prompt() -> None:
    objectives = Objectives(ttft_s=0.1, tpot_s=0.05, ttft_stretch=5.0)
    assert objectives.ttft_for(0.2) == pytest.approx(1.1)
    assert Speed(ttft_s=1.0, tpot_s=0.05).meets(objectives, 0.2)
    assert not Speed(ttft_s=1.0, tpot_s=0.05).meets(objectives)
    assert not Speed(ttft_s=0.0, tpot_s=0.06).meets(objectives)
    with pytest.raises(ValueError, match="positive"):
        Objectives(ttft_s=0.0, tpot_s=1.0)
