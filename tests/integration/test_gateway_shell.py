"""The gateway's shell at its edges: cancelled at every await, talked to in garbage, cut off, stopped. Nothing is left behind,
and no one request ends the service."""

import asyncio
from dataclasses import replace

import pytest

from common.engine.synthetic import StepTimes
from common.ports.broker import Message
from common.ports.generation import GenerationRequest, TokenEvent
from common.protocol.messages import Snapshot, encode
from common.values.errors import PayloadTooLarge, Unavailable
from common.values.ids import GatewayId, WorkerId
from services.gateway.live_generation import LiveGeneration
from services.gateway.mesh_client import LiveMesh
from tests.mesh_in_memory import MeshInMemory, collect, request, running_mesh, tokens

SLOW = StepTimes(fixed=0.02)
GARBAGE = (b"", b"\xff\xff", b"\xc0", b"\x90", b"\x81\xa1v\x01")


async def pair(mesh: MeshInMemory) -> LiveMesh:
    await mesh.start_worker("p0", "prefill", times=SLOW)
    await mesh.start_worker("d0", "decode", times=SLOW)
    gateway = await mesh.start_gateway()
    await mesh.settled(gateway)
    return gateway


async def read(generation: LiveGeneration) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    while batch := await generation.next_events():
        events.extend(batch)
    return events


async def test_a_start_can_be_cancelled_at_every_await() -> None:
    async with running_mesh() as mesh:
        gateway = await pair(mesh)
        accepted = 0
        for turns in range(40):
            starting = asyncio.create_task(gateway.start(request(range(3, 30), max_tokens=40, choices=2)))
            for _ in range(turns):
                await asyncio.sleep(0)
            starting.cancel()
            await asyncio.wait([starting])
            if not starting.cancelled():
                accepted += 1
                await starting.result().close()
            assert gateway.core.active == 0
        assert 0 < accepted < 40
        await mesh.quiet()
        assert len(tokens((await collect(gateway, request([5])))[0])) == 8


async def test_a_reader_can_be_cancelled_and_loses_nothing() -> None:
    async with running_mesh() as mesh:
        gateway = await pair(mesh)
        generation = await gateway.start(request(range(3, 30), max_tokens=20))
        events: list[TokenEvent] = []
        while not events or events[-1].ending is None:
            reading = asyncio.create_task(generation.next_events())
            await asyncio.sleep(0.005)
            reading.cancel()
            await asyncio.wait([reading])
            if not reading.cancelled():
                events.extend(reading.result())
        assert [event.index for event in events] == list(range(20))
        await generation.close()
        await mesh.quiet()


async def test_close_is_idempotent_and_never_raises() -> None:
    async with running_mesh() as mesh:
        gateway = await pair(mesh)
        generation = await gateway.start(request(range(3, 30), max_tokens=100))
        mesh.store.set_available(False)
        mesh.broker.stop()
        generation.cancel(0)
        await generation.close()
        await generation.close()
        generation.cancel()
        assert await generation.next_events() == []
        mesh.broker.start()
        mesh.store.set_available(True)
        await mesh.quiet()


async def test_garbage_ends_nobody() -> None:
    async with running_mesh() as mesh:
        gateway = await pair(mesh)
        stranger = mesh.broker.connect()
        names = mesh.names
        subjects = [names.gateway_tokens(GatewayId("g0")), names.snapshot(WorkerId("nobody"))]
        subjects += [subject(WorkerId(worker)) for worker in ("p0", "d0") for subject in (names.worker_inbox, names.worker_replay)]
        generation = await gateway.start(request(range(3, 30), max_tokens=40))
        for subject in subjects:
            for payload in GARBAGE:
                stranger.publish(subject, payload)
                assert await stranger.request(subject, payload, timeout_s=0.01) is None
        events = await read(generation)
        assert len(tokens(events)) == 40
        await generation.close()
        await mesh.quiet()


async def pretend(mesh: MeshInMemory, gateway: LiveMesh, name: str, answer: bytes | None) -> None:
    """A worker that looks like the others, but quicker, and gives one answer to everything, or none."""
    stranger = mesh.broker.connect()

    def handle(message: Message) -> None:
        if answer is not None:
            message.respond(answer)

    await stranger.subscribe(mesh.names.worker_inbox(WorkerId(name)), handle)
    await stranger.subscribe(mesh.names.worker_replay(WorkerId(name)), handle)
    real = next(iter(gateway.core.registry.all()))
    looks = replace(real, worker=WorkerId(name), role="both", seconds_per_step=1e-9, seconds_per_prefill_token=1e-9)
    stranger.publish(mesh.names.snapshot(WorkerId(name)), encode(Snapshot(snapshot=looks)))
    async with asyncio.timeout(5):
        while gateway.core.registry.get(WorkerId(name)) is None:
            await asyncio.sleep(0.01)


async def test_a_worker_that_answers_in_garbage_is_passed_over() -> None:
    async with running_mesh() as mesh:
        gateway = await pair(mesh)
        await pretend(mesh, gateway, "fake", b"\xff")
        assert len(tokens((await collect(gateway, request(range(3, 30))))[0])) == 8
        assert gateway.core.counters["workers_lost"] == 1
        await mesh.quiet()


def heavy() -> GenerationRequest:
    """What even without its prompt passes a small broker's limit."""
    return request([5], logit_bias=dict.fromkeys(range(900), 1.5))


async def test_what_no_message_can_carry_is_refused_and_the_rest_goes_on() -> None:
    async with running_mesh(max_payload_bytes=4096) as mesh:
        gateway = await pair(mesh)
        other = await gateway.start(request(range(3, 30), max_tokens=40))
        with pytest.raises(PayloadTooLarge):
            await gateway.start(heavy())
        events = await read(other)
        assert len(tokens(events)) == 40
        await mesh.quiet()


async def test_probes_of_many_choices_pass_a_small_broker() -> None:
    """All choices wait behind slow steps: their probes together are larger than one message may be."""
    async with running_mesh(max_payload_bytes=4096) as mesh:
        await mesh.start_worker("b0", "both", times=StepTimes(fixed=0.3), max_num_seqs=100, blocks=512, max_tokens=256)
        gateway = await mesh.start_gateway()
        await mesh.settled(gateway)
        events = await collect(gateway, request([5], max_tokens=3, choices=100))
        assert all(len(tokens(events[choice])) == 3 for choice in range(100))
        assert gateway.core.counters["probes"]
        assert gateway.core.counters["workers_lost"] == 0
        await mesh.quiet()


async def test_a_replay_larger_than_a_message_comes_in_parts() -> None:
    """The gateway was away while many scored tokens were made."""
    async with running_mesh(max_payload_bytes=4096) as mesh:
        worker = await mesh.start_worker("b0", "both")
        gateway = await mesh.start_gateway()
        await mesh.settled(gateway)
        generation = await gateway.start(request([5], max_tokens=200, logprobs=0))
        mesh.gateway_brokers["g0"].disconnect()
        async with asyncio.timeout(10):
            while not worker.service.core.idle:
                await asyncio.sleep(0.01)
        mesh.gateway_brokers["g0"].reconnect()
        events = await read(generation)
        assert len(tokens(events)) == 200
        assert all(event.logprobs is not None for event in events)
        assert gateway.core.counters["workers_lost"] == 0
        await generation.close()
        await mesh.quiet()


async def test_a_gateway_that_stops_tells_its_readers_and_its_workers() -> None:
    async with running_mesh() as mesh:
        gateway = await pair(mesh)
        running = await gateway.start(request(range(3, 30), max_tokens=200))
        await pretend(mesh, gateway, "silent", None)
        starting = asyncio.create_task(gateway.start(request([5])))
        await asyncio.sleep(0.05)
        assert not starting.done()
        ((_, task),) = mesh.gateways
        task.cancel()
        await asyncio.wait([task])
        with pytest.raises(Unavailable, match="stopping"):
            await read(running)
        with pytest.raises(Unavailable, match="stopping"):
            await starting
        assert gateway.core.active == 0
        with pytest.raises(Unavailable):
            await gateway.start(request([5]))
        await running.close()
        await mesh.quiet()
        assert mesh.workers["d0"].service.core.counters.tokens < 100
