"""A request that takes down every worker which computes its prompt: it ends before a third one dies, its neighbours finish."""

import asyncio
import secrets

import pytest

from tests.faults.fault_client import MODEL, Record, requests, run
from tests.faults.fault_laws import wrong
from tests.faults.fault_mesh import WORKERS, fault_mesh
from tests.faults.world import SYNTHETIC

POISON = 31337


@pytest.mark.servers
@pytest.mark.timeout(240)
async def test_a_poison_request_takes_two_workers_down_and_no_third_and_its_neighbours_finish() -> None:
    async with fault_mesh(SYNTHETIC) as mesh:
        for name in WORKERS:
            await mesh.restart(name, f"prefill.step_started=kill,token={POISON}")
        before = mesh.deaths
        nonce = secrets.token_hex(4)
        neighbours = requests(nonce)
        poison = Record("poison", "/v1/completions", {"model": MODEL, "prompt": [5, 6, POISON, 7], "max_tokens": 8, "stream": True})
        await asyncio.gather(*(run(record, mesh.gateway_urls) for record in (*neighbours, poison)))
        assert poison.error is not None
        assert "request_poisoned" in poison.error
        assert not poison.events
        await mesh.whole()
        assert mesh.deaths - before == 2
        undisturbed = requests(nonce)
        await asyncio.gather(*(run(record, mesh.gateway_urls) for record in undisturbed))
        assert all(record.done for record in neighbours)
        assert not wrong(neighbours, undisturbed)
