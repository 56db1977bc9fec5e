"""The everyday part of the fault suite; `./tools/test --faults` runs all of it and prints its table."""

import pytest

from tests.faults.abort_cases import GROUP as ABORTS
from tests.faults.fault_cases import faults
from tests.faults.poison_cases import GROUP as POISON
from tests.faults.poison_cases import MOST_LOST
from tests.faults.run_faults import run_all


@pytest.mark.servers
@pytest.mark.timeout(240)
async def test_streams_outlive_workers_their_gateway_and_a_poison_request() -> None:
    everyday = [fault for fault in faults() if fault.is_everyday]
    outcomes = await run_all(everyday)
    assert len(outcomes) == len(everyday)
    for outcome in outcomes:
        assert outcome.is_good, outcome
        assert outcome.deaths == {ABORTS: 0, POISON: MOST_LOST}.get(outcome.group, 1), "the fault must have happened"
