"""However a request ends, at any moment of its life: what was held for it is free or cached, and the metrics say so."""

import asyncio
from collections.abc import Callable

import pytest

from common.engine.synthetic import StepTimes
from common.mesh.worker import WorkerCore
from common.runtime.metrics import Metrics
from common.runtime.worker_metrics import show_worker_metrics
from tests.mesh_in_memory import MeshInMemory, request, running_mesh

SLOW = StepTimes(fixed=0.01)
REACHED: dict[str, Callable[[WorkerCore, WorkerCore], bool]] = {
    "queued": lambda p, d: p.load().waiting > 0,
    "prefilling": lambda p, d: p.load().queued_tokens > 0 and p.load().running > 0,
    "offered": lambda p, d: p.leases().offers > 0,
    "mid-transfer": lambda p, d: d.leases().reservations > 0,
    "decoding": lambda p, d: d.counters.tokens > 0,
    "preempted": lambda p, d: d.load().preemptions > 0,
    "finishing": lambda p, d: d.counters.ended["length"] > 0,
}


def shown(mesh: MeshInMemory) -> dict[str, float]:
    """Name and labels → value, over all workers."""
    values: dict[str, float] = {}
    for worker in mesh.workers.values():
        metrics = Metrics()
        show_worker_metrics(metrics, worker.service)
        for line in metrics.exposition().splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                values[name] = values.get(name, 0.0) + float(value)
    return values


@pytest.mark.parametrize("phase", REACHED)
async def test_an_abort_in_any_phase_leaves_nothing(phase: str) -> None:
    async with running_mesh() as mesh:
        prefill = await mesh.start_worker("p0", "prefill", times=SLOW, max_num_seqs=2, max_tokens=8)
        decode = await mesh.start_worker("d0", "decode", times=SLOW, blocks=24)
        gateway = await mesh.start_gateway()
        await mesh.settled(gateway)
        running = [await gateway.start(request(range(3 + n, 23 + n), max_tokens=60 + n)) for n in range(6)]
        async with asyncio.timeout(20):
            while not REACHED[phase](prefill.service.core, decode.service.core):
                await asyncio.sleep(0)
        for generation in running:
            await generation.close()
        async with asyncio.timeout(10):
            await mesh.quiet()
        values = shown(mesh)
        for kind in ("offers", "reservations", "queued", "seals", "pulls"):
            assert values[f'segue_leases{{kind="{kind}"}}'] == 0
        for name in ("segue_sequences_waiting", "segue_sequences_running", "segue_sequences_held", "segue_kv_blocks_leased"):
            assert values[name] == 0
        assert values["segue_kv_blocks_free"] + values["segue_kv_blocks_cached"] == values["segue_kv_blocks"]
