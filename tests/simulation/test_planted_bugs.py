"""The simulation finds bugs: each rule that is taken out breaks a law within some hundred worlds."""

import pytest

from tests.simulation.planted_bugs import BUGS, Bug, planted
from tools.simulate_faults import run_seed

MOST_WORLDS = 1500


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
def test_a_planted_bug_is_found(bug: Bug) -> None:
    with planted(bug):
        for seed in range(MOST_WORLDS):
            broken = run_seed(seed, strength=bug.weather).broken
            if broken is not None and bug.law in broken:
                return
    raise AssertionError(f"{MOST_WORLDS} worlds did not show: {bug.name}")
