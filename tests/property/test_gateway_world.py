"""Laws of a gateway above real workers, in any schedule: with a broker that delays and loses, workers that die or freeze,
connections that break, clients that leave; and a second gateway that takes requests over at any point.

The world asserts while it runs: tokens as alone, gapless, once, with their own scores; one end per request, with a cause
where it failed; one probe at a time; no loop of dispatches. At the end no worker holds anything.
"""

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.adoption_world import AdoptionWorld
from tests.gateway_world import CALM, Faults, GatewayWorld

EVENTS = 400
NEW_REQUESTS = 0.03
TAKE_OVERS = 0.03
WEATHERS = {
    "calm": CALM,
    "clients leave": Faults(cancels=0.02, deadlines=True),
    "lossy broker": Faults(losses=0.1, delay_s=1.0),
    "broker outages": Faults(outages=0.006),
    "lost connections": Faults(breaks=0.015),
    "frozen workers": Faults(freezes=0.006),
    "dying workers": Faults(deaths=0.004),
    "poison": Faults(poison=0.15),
    "leaving workers": Faults(leaves=0.006),
    "storm": Faults(leaves=0.002, cancels=0.01, breaks=0.005, losses=0.03, outages=0.003, deaths=0.002, freezes=0.003, delay_s=3.0),
}


def run_world(seed: int, faults: Faults, *, waiting: int | None = None) -> GatewayWorld:
    random = Random(seed)
    world = GatewayWorld(random, workers=2 + seed % 2, faults=faults, waiting=waiting)
    for _ in range(EVENTS):
        if random.random() < NEW_REQUESTS:
            world.start_request()
        world.do_something()
    world.finish()
    return world


@pytest.mark.parametrize("faults", WEATHERS.values(), ids=WEATHERS.keys())
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_request_ends_once_with_the_tokens_it_makes_alone(faults: Faults, seed: int) -> None:
    run_world(seed, faults)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), leaves=st.booleans())
def test_without_a_fault_no_attempt_is_raised_but_for_full_queues(seed: int, leaves: bool) -> None:
    world = run_world(seed, WEATHERS["clients leave"] if leaves else CALM)
    counters = world.core.counters
    assert counters["unknown"] == counters["workers_lost"] == counters["dispatch_stale"] == 0
    dispatches = sum(client.dispatches for client in world.clients.values())
    assert dispatches <= len(world.clients) + counters["dispatch_full"]
    failed = {kind for kind in world.counts if kind.startswith("failed_")}
    assert failed <= {"failed_overloaded", "failed_deadline_exceeded"}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_request_that_kills_workers_takes_two_at_most_and_its_neighbours_finish(seed: int) -> None:
    world = run_world(seed, WEATHERS["poison"])
    for client in world.clients.values():
        assert client.killed <= 2
        assert (getattr(client.error, "code", None) == "request_poisoned") == (client.killed >= 2)
        assert client.error is None or client.killed >= 2 or world.counts["dispatch_full"]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_workers_that_leave_cost_no_request_and_nobody_is_taken_for_lost(seed: int) -> None:
    world = run_world(seed, WEATHERS["leaving workers"])
    counters = world.core.counters
    assert counters["workers_lost"] == counters["suspects_announced"] == counters["requests_poisoned"] == 0
    assert {kind for kind in world.counts if kind.startswith("failed_")} <= {"failed_overloaded"}


@pytest.mark.parametrize("faults", [CALM, WEATHERS["storm"]], ids=["calm", "storm"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_whoever_takes_requests_over_ends_them_and_the_first_gateway_loses_cleanly(faults: Faults, seed: int) -> None:
    run_adoptions(seed, faults)


def run_adoptions(seed: int, faults: Faults) -> AdoptionWorld:
    random = Random(seed)
    world = AdoptionWorld(random, workers=2 + seed % 2, faults=faults)
    for _ in range(EVENTS):
        if random.random() < NEW_REQUESTS:
            world.start_request()
        if random.random() < TAKE_OVERS:
            world.take_over()
        world.do_something()
    world.finish()
    return world


def test_the_adoptions_reach_what_they_are_for() -> None:
    seen: Counter[str] = Counter()
    for seed in range(30):
        world = run_adoptions(seed, WEATHERS["storm"] if seed % 2 else CALM)
        seen.update(world.counts)
        seen.update(world.core.counters)
    for what in ("taken_over", "compare_and_set_lost", "dropped", "told", "adopted"):
        assert seen[what], f"no schedule has {what}"


def test_the_schedules_reach_what_they_are_for() -> None:
    """A law that is never put to the test holds easily."""
    seen: Counter[str] = Counter()
    for seed in range(40):
        weather = WEATHERS["leaving workers" if seed % 8 == 7 else "storm"]
        world = run_world(seed, weather, waiting=2 if seed % 4 == 0 else None)
        seen.update(world.counts)
        seen.update(world.core.counters)
        seen["moved"] += sum(node.core.desk.counters.settled["moved"] for node in world.nodes.values())
    for what in (
        *("death", "freeze", "outage", "silence", "lose", "cancel", "cancel_choice", "lost_message", "unanswered", "moved"),
        *("dispatch_full", "probes", "unknown", "workers_lost", "stray_frames", "suspects_announced"),
        *("leave", "handed_back"),
    ):
        assert seen[what], f"no schedule has {what}"
