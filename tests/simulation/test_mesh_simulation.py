"""Laws of the whole mesh in virtual time, over many seeds: each is another world of requests and faults.

The world checks while it runs: right tokens, gapless and once, no token of a dead attempt, each index emitted once, nothing
emitted after its cancel, no block with two owners, no work that nobody wants for long; at the end everything drains and
nothing is held. What a single fault does, nobody notices. A seed that fails is read with
`./tools/segue simulate-faults --seed N --trace`.
"""

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from common.simulation.fault_strength import FaultStrength
from tools.simulate_faults import Outcome, run_seed, run_seeds

ROOT = Path(__file__).parents[2]
PART = 150
QUICK = 600
LONG = 10_000


def check(outcomes: list[Outcome]) -> Counter[str]:
    broken = [f"seed {outcome.seed}: {outcome.broken}" for outcome in outcomes if outcome.broken is not None]
    assert not broken
    return sum((outcome.counts for outcome in outcomes), Counter())


@pytest.mark.parametrize("first", range(0, QUICK, PART))
def test_every_world_keeps_the_laws(first: int) -> None:
    check(list(run_seeds(range(first, first + PART))))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_worlds_keep_the_laws() -> None:
    check(list(run_seeds(range(QUICK, QUICK + LONG), jobs=os.cpu_count() or 1)))


def test_the_worlds_reach_what_they_are_for() -> None:
    """A law that is never put to the test holds easily."""
    seen = check(list(run_seeds(range(120))))
    for what in (
        *("death", "freeze", "hang", "drain", "gateway_death", "gateway_freeze", "outage", "partition", "break", "store_outage"),
        *("lost_message", "handoffs", "dispatch_full", "Busy", "Refuse", "Withdraw", "ForwardedCancel", "Held"),
        *("block_copied", "block_checksum"),
    ):
        assert seen[what], f"no world has {what}"
    rare = {"block_refused", "block_lost"}
    for outcome in run_seeds(range(290, 900)):
        rare = {what for what in rare if not outcome.counts[what]}
        if not rare:
            break
    assert not rare, f"no world has {rare}"


def test_gateways_lose_requests_to_each_other() -> None:
    weather = FaultStrength(gateway_deaths=1, gateway_freezes=3, store_outages=2, impatience=1.0, step_s=0.3)
    seen = check([run_seed(seed, strength=weather) for seed in range(40)])
    for what in (
        *("attached_TakenOver", "attached_EndedElsewhere", "attached_Ours", "left_silent", "dropped", "old_owners_cancel"),
        *("log_entries", "store_refuses", "store_silent", "store_slow", "store_emptied"),
    ):
        assert seen[what], f"no world has {what}"


def test_what_nobody_comes_back_to_ends_with_its_owners_lease() -> None:
    """Gateways die while steps are slow, and no client returns: workers end what is left after 30 s."""
    abandoned = FaultStrength(step_s=0.6, gateway_deaths=2, abandonment=1.0)
    seen = check([run_seed(seed, strength=abandoned) for seed in range(25)])
    assert seen["abandoned"]
    assert seen["owner_lost"]


def test_a_gateways_death_costs_one_resume() -> None:
    """Whoever was accepted comes back once, at any gateway, and has all that was asked for."""
    for fault in ("gateway_deaths", "gateway_freezes"):
        weather = FaultStrength(step_s=0.05, impatience=1.0, **{fault: 1})
        seen = check([run_seed(seed, strength=weather) for seed in range(40)])
        assert seen["attached_TakenOver"]


def test_a_seed_is_the_same_world_in_another_process() -> None:
    """Also where sets are ordered otherwise: nothing may depend on the order of hashes of strings."""
    code = "import sys; from tools.simulate_faults import run_seed; sys.stdout.write('\\n'.join(run_seed(17, trace=True).trace))"
    traces = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True, timeout=60)
        traces.append(done.stdout)
    here = "\n".join(run_seed(17, trace=True).trace).encode()
    assert len(here) > 10_000
    assert [hashlib.sha256(trace).hexdigest() for trace in traces] == [hashlib.sha256(here).hexdigest()] * 2


def test_a_world_is_the_same_with_and_without_a_trace() -> None:
    for seed in range(20):
        told, silent = run_seed(seed, trace=True), run_seed(seed)
        assert (told.actions, told.virtual_s, told.counts) == (silent.actions, silent.virtual_s, silent.counts)


STORM = {"deaths": 1, "breaks": 1, "message_loss": 0.05, "drains": 1, "leaving": 0.3}


@pytest.mark.parametrize("faults", [{}, STORM], ids=["calm", "stormy"])
def test_roles_that_change_at_any_time_lose_and_double_nothing(faults: dict[str, float]) -> None:
    weather = FaultStrength(role_changes=6, step_s=0.05, **faults)  # type: ignore[arg-type]
    seen = check([run_seed(seed, strength=weather) for seed in range(40)])
    assert seen["role_change"] > 100
    assert seen["handoffs"]
