"""Laws of workers that hand sequences over to each other, in any schedule, with small pools, and in bad weather.

The world asserts while it runs: tokens as alone, each index emitted once within an attempt, nothing after a cancel, every
KV position that is read the right one, no block given away while somebody works on it, invariants after each event. At
the end nothing is left: no sequence, no held block, no grant, no queued offer.
"""

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.protocol.messages import Last
from common.values.ids import WorkerId
from common.values.sampling import SamplingParameters
from tests.handoff_node import BLOCK, Node
from tests.handoff_quiescence import finish, probe, settle
from tests.handoff_requests import Request
from tests.handoff_world import CALM, HandoffWorld, Weather

EVENTS = 250
NEW_REQUESTS = 0.05
WEATHERS = {
    "calm": CALM,
    "bad blocks": Weather(bad_blocks=0.15),
    "cancels and new attempts": Weather(cancels=0.02, raises=0.01),
    "lost connections": Weather(losses=0.015),
    "workers that leave": Weather(drains=0.01),
    "storm": Weather(cancels=0.01, raises=0.005, losses=0.01, bad_blocks=0.05, drains=0.002),
}


def run_world(random: Random, weather: Weather, *, workers: int, mixed: bool) -> HandoffWorld:
    world = HandoffWorld(random, workers=workers, weather=weather, mixed=mixed)
    for _ in range(EVENTS):
        if random.random() < NEW_REQUESTS:
            world.add_random_request()
        world.do_something()
    finish(world)
    return world


@pytest.mark.parametrize("weather", WEATHERS.values(), ids=WEATHERS.keys())
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), workers=st.sampled_from([2, 2, 3]), mixed=st.booleans())
def test_every_request_ends_once_with_the_tokens_it_makes_alone(weather: Weather, seed: int, workers: int, mixed: bool) -> None:
    run_world(Random(seed), weather, workers=workers, mixed=mixed)


def test_the_schedules_reach_what_they_are_for() -> None:
    """A law that is never put to the test holds easily."""
    seen: Counter[str] = Counter()
    for seed in range(40):
        world = run_world(Random(seed), WEATHERS["storm"], workers=2 + seed % 2, mixed=seed % 3 == 0)
        seen.update(world.counts)
        for node in world.nodes.values():
            load = node.engine.load()
            seen.update(preempted=load.preemptions, prefix_hit=load.prefix_hit_tokens)
            seen.update({f"settled_{outcome}": count for outcome, count in node.core.desk.counters.settled.items()})
    for what in (
        *("emitted_by_two", "Busy", "Withdraw", "Refuse", "ForwardedCancel", "preempted", "prefix_hit", "lose", "cancel", "raise"),
        *("drain", "notice_moved", "notice_handed_back"),
        *("settled_moved", "settled_kept", "settled_dropped", "settled_running", "settled_released"),
        *("block_copied", "block_generation", "block_checksum", "block_lost", "block_refused", "dispatch_full"),
    ):
        assert seen[what], f"no schedule has {what}"


def greedy(max_tokens: int = 6) -> SamplingParameters:
    return SamplingParameters(max_tokens=max_tokens, seed=1, ignore_eos=True, logprobs=0)


def calm_pair(seed: int = 3) -> HandoffWorld:
    return HandoffWorld(Random(seed), workers=2, pool=(64, 64), audible=True)


def finish_calmly(world: HandoffWorld) -> None:
    finish(world)
    for request in world.requests.values():
        assert request.attempt == 1


PROMPT = tuple(n % 7 for n in range(5 * BLOCK + 2))


def test_the_second_identical_prompt_moves_at_most_one_block() -> None:
    world = calm_pair()
    world.add_request(PROMPT, greedy(), worker="p", decode="d")
    finish_calmly(world)
    assert world.counts["pulled"] == 6
    world.add_request(PROMPT, greedy(), worker="p", decode="d")
    finish_calmly(world)
    assert world.counts["emitted_by_two"] == 2
    assert world.counts["pulled"] <= 7


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_choices_share_one_transfer_in_any_schedule(seed: int) -> None:
    world = calm_pair(seed)
    request = world.add_request(PROMPT, greedy(), choices=3, worker="p", decode="d")
    finish_calmly(world)
    assert world.counts["emitted_by_two"] == 3
    assert world.counts["pulled"] <= 6 + 2, "the followers' full blocks are known; only the last one is their own"
    assert [choice.emitters for choice in request.choices.values()] == [["p", "d"]] * 3


def test_a_prompt_flows_chunk_by_chunk_and_its_first_token_leaves_from_the_prefill_worker() -> None:
    world = calm_pair()
    request = world.add_request(PROMPT, greedy(), worker="p", decode="d")
    finish_calmly(world)
    (choice,) = request.choices.values()
    assert choice.emitters == ["p", "d"]
    assert world.counts["Offer"] == world.counts["Accept"] == world.counts["Last"] == world.counts["Ack"] == 1
    assert world.counts["Ready"] > 1


def test_the_right_to_emit_waits_for_seals_that_return_out_of_order() -> None:
    world = calm_pair()
    world.add_request(PROMPT, greedy(), worker="p", decode="d")
    p = world.nodes[WorkerId("p")]
    world.deliver_inbox(p)
    while not any(seal.blocks[-1].index == 5 for seal in p.seals):
        world.run_step(p)
    assert len(p.seals) > 1
    while p.seals:
        world.seal(p, len(p.seals) - 1)
    finish_calmly(world)
    assert world.counts["pulled"] == world.counts["block_copied"] == 6


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_a_sequence_that_ends_with_its_first_token_is_not_moved(max_tokens: int) -> None:
    world = calm_pair()
    world.add_request(PROMPT, greedy(max_tokens), worker="p", decode="d")
    finish_calmly(world)
    assert world.counts["emitted_by_two"] == max_tokens - 1
    assert world.counts["Offer"] == max_tokens - 1


def test_a_pool_that_just_fits_takes_the_hand_off() -> None:
    """Whatever `can_ever_fit` lets in can be received by an empty pool, without waiting for anybody's patience."""
    world = HandoffWorld(Random(1), workers=2, pool=(4, 4))
    world.add_request(tuple(range(4 * BLOCK - 2)), greedy(2), worker="p", decode="d")
    finish_calmly(world)
    assert world.counts["emitted_by_two"] == 1


def until_last_is_sent(world: HandoffWorld) -> None:
    p = world.nodes[next(name for name in world.nodes if name == "p")]
    link = next(iter(world.links.values()))
    for _ in range(2000):
        if any(b"last" in payload and b"reservation" in payload for payload in link.channels[other(world, p).worker]):
            return
        world.random.choice(world.enabled())()
    raise AssertionError(f"no {Last.__name__} was sent")


def other(world: HandoffWorld, node: Node) -> Node:
    return next(n for n in world.nodes.values() if n is not node)


def lose_now(world: HandoffWorld, *, arrives: bool) -> Request:
    """Send LAST, then lose the connection, with or without what was under way."""
    request = world.add_request(PROMPT, greedy(), worker="p", decode="d")
    until_last_is_sent(world)
    (link,) = world.links.values()
    link.broken = True
    if not arrives:
        for channel in link.channels.values():
            channel.clear()
    world.counts["lose"] += 1
    settle(world)
    return request


def test_a_connection_lost_after_last_arrived_changes_nothing() -> None:
    world = calm_pair()
    request = lose_now(world, arrives=True)
    assert request.over
    finish_calmly(world)


def test_a_last_that_is_lost_is_found_by_the_probe() -> None:
    """The right to emit was in that message: neither side goes on, the sender says `moved`, the receiver knows nothing."""
    world = calm_pair()
    request = lose_now(world, arrives=False)
    assert not request.over
    assert [probe(world, node.worker, request, 0) for node in world.nodes.values()] == ["moved", "unknown"]
    finish(world)
    assert request.attempt == 2
