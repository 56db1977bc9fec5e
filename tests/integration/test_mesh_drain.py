"""A worker that is told to stop moves what it runs to the others: no stream notices, nothing is computed twice that need not be."""

import asyncio

from common.engine.synthetic import StepTimes
from common.ports.generation import GenerationRequest, TokenEvent
from services.gateway.mesh_client import LiveMesh
from tests.mesh_in_memory import MeshInMemory, collect, request, running_mesh, tokens

SLOW = StepTimes(fixed=0.02)


async def stream(gateway: LiveMesh, wanted: GenerationRequest, seen: list[TokenEvent], enough: asyncio.Event, count: int) -> None:
    generation = await gateway.start(wanted)
    while batch := await generation.next_events():
        seen.extend(batch)
        if len(seen) >= count:
            enough.set()
    await generation.close()


async def drained_streams(mesh: MeshInMemory, gateway: LiveMesh, leaver: str, *, streams: int) -> None:
    """Streams run, the worker leaves in their middle, every stream is what it is without that."""
    wanted = [request(range(3 + n, 30 + n), max_tokens=60) for n in range(streams)]
    seen: list[list[TokenEvent]] = [[] for _ in wanted]
    enough = [asyncio.Event() for _ in wanted]
    async with asyncio.TaskGroup() as tasks:
        for one, events, event in zip(wanted, seen, enough, strict=True):
            tasks.create_task(stream(gateway, one, events, event, 8))
        for event in enough:
            await event.wait()
        await mesh.workers[leaver].stop()
    for one, events in zip(wanted, seen, strict=True):
        assert [event.index for event in events] == list(range(60))
        again = await collect(gateway, request(one.prompt, max_tokens=60))
        assert tokens(events) == tokens(again[0])
    assert gateway.core.counters["workers_lost"] == 0
    await mesh.quiet()


async def test_a_decode_worker_that_leaves_hands_its_streams_to_the_other_one() -> None:
    async with running_mesh() as mesh:
        for name, role in (("p0", "prefill"), ("d0", "decode"), ("d1", "decode")):
            await mesh.start_worker(name, role, times=SLOW)  # type: ignore[arg-type]
        gateway = await mesh.start_gateway()
        await mesh.settled(gateway)
        leaver = mesh.workers["d0"].service.core
        await drained_streams(mesh, gateway, "d0", streams=4)
        moved = leaver.desk.counters.settled["moved"]
        assert moved >= 1
        assert moved + leaver.counters.ended["handed_back"] >= 2
        assert gateway.core.counters["handed_back"] == 0


async def test_with_no_decode_worker_left_the_prefill_worker_decodes_and_the_other_way_round() -> None:
    for leaver, stays in (("d0", "p0"), ("p0", "d0")):
        async with running_mesh() as mesh:
            await mesh.start_worker("p0", "prefill", times=SLOW)
            await mesh.start_worker("d0", "decode", times=SLOW)
            gateway = await mesh.start_gateway()
            await mesh.settled(gateway)
            await drained_streams(mesh, gateway, leaver, streams=2)
            assert mesh.workers[stays].service.core.counters.tokens >= 60


async def test_where_nobody_else_is_left_streams_end_where_they_run() -> None:
    async with running_mesh() as mesh:
        await mesh.start_worker("b0", "both", times=SLOW)
        gateway = await mesh.start_gateway()
        await mesh.settled(gateway)
        seen: list[TokenEvent] = []
        enough = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(stream(gateway, request(range(3, 9), max_tokens=30), seen, enough, 3))
            await enough.wait()
            await mesh.workers["b0"].stop()
        assert len(tokens(seen)) == 30
