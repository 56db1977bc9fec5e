"""Requests find the worker that holds their prefix: a whole mesh in one process, with what its workers publish."""

import asyncio
from collections.abc import Sequence

from common.engine.synthetic import StepTimes
from common.ports.generation import GenerationRequest
from common.values.ids import WorkerId
from services.gateway.mesh_client import LiveMesh
from tests.mesh_in_memory import MeshInMemory, collect, request, running_mesh

PREFIXES = [[3 + number * 10 + place % 9 for place in range(160)] for number in range(4)]
SMALL_MESSAGES = 2048
"""A page of it has 32 names: what a worker holds here takes two."""


def hits(mesh: MeshInMemory) -> dict[str, int]:
    return {name: worker.service.core.load().prefix_hit_tokens for name, worker in mesh.workers.items()}


async def known(mesh: MeshInMemory, gateway: LiveMesh) -> None:
    """Wait until the gateway knows exactly what every worker holds."""
    async with asyncio.timeout(10):
        while any(
            gateway.core.registry.prefixes.names(WorkerId(name)) != worker.service.core.prefix_log.names
            for name, worker in mesh.workers.items()
        ):
            await asyncio.sleep(0.02)


async def one_after_another(mesh: MeshInMemory, gateway: LiveMesh, requests: Sequence[GenerationRequest]) -> None:
    for wanted in requests:
        await collect(gateway, wanted)
        await mesh.quiet()
        await known(mesh, gateway)


async def start(mesh: MeshInMemory) -> LiveMesh:
    times = StepTimes(per_prefill_token=2e-4)
    await mesh.start_worker("a", "both", times=times)
    await mesh.start_worker("b", "both", times=times)
    gateway = await mesh.start_gateway()
    await mesh.settled(gateway)
    return gateway


async def test_a_prefix_seen_before_goes_where_it_is_held() -> None:
    async with running_mesh(max_payload_bytes=SMALL_MESSAGES) as mesh:
        gateway = await start(mesh)
        await asyncio.gather(*(collect(gateway, request([*prefix, 1], max_tokens=2)) for prefix in PREFIXES))
        await mesh.quiet()
        await known(mesh, gateway)
        before = hits(mesh)
        assert sum(before.values()) == 0
        assert all(len(worker.service.core.prefix_log.names) >= 40 for worker in mesh.workers.values()), "both took some"
        await one_after_another(mesh, gateway, [request([*prefix, 2, 5], max_tokens=2) for prefix in reversed(PREFIXES)])
        assert sum(hits(mesh).values()) == sum(len(prefix) for prefix in PREFIXES), "every prompt found its prefix"


async def test_a_gateway_that_comes_late_is_told_the_whole_set() -> None:
    async with running_mesh(max_payload_bytes=SMALL_MESSAGES) as mesh:
        gateway = await start(mesh)
        await asyncio.gather(*(collect(gateway, request([*prefix, 1], max_tokens=2)) for prefix in PREFIXES))
        await mesh.quiet()
        late = await mesh.start_gateway("late")
        await mesh.settled(late)
        await known(mesh, late)
        await known(mesh, gateway)
        await one_after_another(mesh, late, [request([*prefix, 2, 5], max_tokens=2) for prefix in PREFIXES])
        assert sum(hits(mesh).values()) == sum(len(prefix) for prefix in PREFIXES)
