"""The everyday part of the fault suite; `./tools/test --faults` runs all of it and prints its table."""

import pytest

from tests.faults.abort_cases import GROUP as ABORTS
from tests.faults.fault_cases import faults
from tests.faults.run_faults import run_all


@pytest.mark.servers
@pytest.mark.timeout(240)
async def test_streams_outlive_a_prefill_worker_a_decode_worker_and_their_gateway() -> None:
    everyday = [fault for fault in faults() if fault.is_everyday]
    outcomes = await run_all(everyday)
    assert len(outcomes) == len(everyday)
    for outcome in outcomes:
        assert outcome.is_good, outcome
        assert outcome.deaths == (outcome.group != ABORTS), "the fault must have happened"
