"""Two gateways in one process: a stream goes on at the other one after its gateway died, froze, or simply lost it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest

from common.engine.synthetic import StepTimes
from common.ports.generation import Generation, GenerationRequest, TokenEvent
from common.protocol.request_record import IdempotencyMark, parse_record
from common.values.errors import IdempotencyKeyReused, Moved, RequestFailed, StoreUnavailable, StreamNotFound
from common.values.ids import RequestId
from common.values.tokens import PositionLogprobs
from services.gateway.mesh_client import LiveMesh
from tests.mesh_in_memory import MeshInMemory, collect, request, running_mesh

SLOW = StepTimes(fixed=0.01)
TENANT = "alice"
Log = dict[int, list[tuple[int | None, PositionLogprobs | None, bool]]]


@dataclass
class Two:
    mesh: MeshInMemory
    first: LiveMesh
    second: LiveMesh


@asynccontextmanager
async def two_gateways(*, roles: tuple[str, ...] = ("prefill", "decode")) -> AsyncIterator[Two]:
    async with running_mesh() as mesh:
        for index, role in enumerate(roles):
            await mesh.start_worker(f"w{index}", role, times=SLOW)  # type: ignore[arg-type]
        first, second = [await mesh.start_gateway(name) for name in ("g0", "g1")]
        for gateway in (first, second):
            await mesh.settled(gateway)
        yield Two(mesh, first, second)


def lingering(prompt: range, **fields: int) -> GenerationRequest:
    return replace(request(prompt, **fields), tenant=TENANT, lingers=True)  # type: ignore[arg-type]


def seen(events: list[TokenEvent], choices: int = 1) -> Log:
    """What a client can see of each choice, however it was cut."""
    log: Log = {choice: [] for choice in range(choices)}
    for event in events:
        assert event.index == len(log[event.choice])
        log[event.choice].append((event.token, event.logprobs, event.ending is not None))
    return log


async def read(generation: Generation, *, until: int | None = None) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    while (until is None or len(events) < until) and (batch := await generation.next_events()):
        events.extend(batch)
    return events


async def undisturbed(gateway: LiveMesh, wanted: GenerationRequest) -> Log:
    twin = replace(wanted, request_id=RequestId(f"{wanted.request_id}-twin"))
    by_choice = await collect(gateway, twin)
    return seen([event for events in by_choice.values() for event in events], wanted.choices)


def die(two: Two, name: str) -> None:
    """The process is gone: nothing that it still does reaches anybody."""
    two.mesh.gateway_brokers[name].disconnect()


@pytest.mark.parametrize("roles", [("both",), ("prefill", "decode")])
async def test_after_its_gateways_death_a_stream_goes_on_at_the_other(roles: tuple[str, ...]) -> None:
    async with two_gateways(roles=roles) as two:
        wanted = lingering(range(3, 30), max_tokens=40, choices=2, logprobs=2)
        expected = await undisturbed(two.second, wanted)
        begun = await read(await two.first.start(wanted), until=10)
        die(two, "g0")
        attached = await two.second.attach(wanted.request_id, TENANT)
        assert attached.request.prompt == wanted.prompt
        events = await read(attached.generation)
        assert seen(events, 2) == expected
        assert seen(begun, 2)[0] == expected[0][: len(seen(begun, 2)[0])]
        assert two.second.core.counters["adopted"] == 1
        assert two.second.core.counters["workers_lost"] == 0
        await two.mesh.quiet()


async def test_where_the_worker_died_as_well_the_log_and_another_worker_give_the_rest() -> None:
    async with two_gateways(roles=("both", "both")) as two:
        wanted = lingering(range(3, 30), max_tokens=100)
        expected = await undisturbed(two.second, wanted)
        await read(await two.first.start(wanted), until=40)
        die(two, "g0")
        [busy] = [worker for worker in two.mesh.workers.values() if not worker.service.core.idle]
        await busy.crash()
        events = await read((await two.second.attach(wanted.request_id, TENANT)).generation)
        assert seen(events) == expected
        await two.mesh.quiet()


async def test_an_owner_that_wakes_up_loses_cleanly() -> None:
    async with two_gateways() as two:
        wanted = lingering(range(3, 30), max_tokens=120)
        expected = await undisturbed(two.second, wanted)
        at_first = await two.first.start(wanted)
        await read(at_first, until=5)
        attached = await two.second.attach(wanted.request_id, TENANT)  # the first one is alive: it only does not know yet
        with pytest.raises(Moved):
            await read(at_first)
        await at_first.close()
        assert two.first.core.counters["dropped"] == 1
        assert two.first.core.active == 0
        assert seen(await read(attached.generation)) == expected
        await two.mesh.quiet()


async def test_a_stream_is_resumed_again_and_again_there_and_back() -> None:
    async with two_gateways() as two:
        wanted = lingering(range(3, 30), max_tokens=120)
        expected = await undisturbed(two.second, wanted)
        generation: Generation = await two.first.start(wanted)
        for turn in range(6):
            await read(generation, until=5 + 10 * turn)
            await generation.close()
            gateway = (two.second, two.first)[turn % 2]
            generation = (await gateway.attach(wanted.request_id, TENANT)).generation
        assert seen(await read(generation)) == expected
        record = await stored(two, wanted.request_id)
        assert record.epoch == 7
        await two.mesh.quiet()


async def stored(two: Two, request_id: RequestId):  # type: ignore[no-untyped-def]
    fields = await two.mesh.store.read(two.mesh.names.request_key(request_id))
    return None if fields is None else parse_record(fields)


async def ended(two: Two, request_id: RequestId) -> None:
    async with asyncio.timeout(5):
        while (await stored(two, request_id)).state == "running":
            await asyncio.sleep(0.01)


async def test_two_read_one_request_at_its_gateway() -> None:
    async with two_gateways() as two:
        wanted = lingering(range(3, 30), max_tokens=60)
        one = await two.first.start(wanted)
        await read(one, until=20)
        other = (await two.first.attach(wanted.request_id, TENANT)).generation
        rest, whole = await asyncio.gather(read(one), read(other))
        assert len(whole) == 60
        assert rest == whole[-len(rest) :]
        assert two.first.core.counters["adopted"] == 0


async def test_many_come_back_at_once_and_it_is_adopted_once() -> None:
    async with two_gateways() as two:
        wanted = lingering(range(3, 30), max_tokens=60)
        expected = await undisturbed(two.second, wanted)
        await read(await two.first.start(wanted), until=10)
        die(two, "g0")

        async def come_back() -> Log:
            return seen(await read((await two.second.attach(wanted.request_id, TENANT)).generation))

        assert await asyncio.gather(*(come_back() for _ in range(8))) == [expected] * 8
        assert two.second.core.counters["adopted"] == 1
        await two.mesh.quiet()


async def test_an_ended_request_is_read_from_its_log_at_any_gateway() -> None:
    async with two_gateways() as two:
        wanted = replace(lingering(range(3, 30), max_tokens=30, choices=2, logprobs=1))
        generation = await two.first.start(wanted)
        events = await read(generation)
        await generation.close()
        await ended(two, wanted.request_id)
        record = await stored(two, wanted.request_id)
        assert (record.state, record.prompt) == ("ended", ())
        for gateway in (two.first, two.second):
            attached = await gateway.attach(wanted.request_id, TENANT)
            assert seen(await read(attached.generation), 2) == seen(events, 2)
            await attached.generation.close()


async def test_others_keys_see_nothing() -> None:
    async with two_gateways() as two:
        wanted = lingering(range(3, 30), max_tokens=30)
        generation = await two.first.start(wanted)
        for gateway in (two.first, two.second):
            for request_id, tenant in ((wanted.request_id, "mallory"), (wanted.request_id, ""), (RequestId("none"), TENANT)):
                with pytest.raises(StreamNotFound):
                    await gateway.attach(request_id, tenant)
        assert len(await read(generation)) == 30


async def test_a_plain_request_ends_with_its_reader_and_one_that_lingers_does_not() -> None:
    async with two_gateways() as two:
        plain = replace(request(range(3, 30), max_tokens=150), tenant=TENANT)
        generation = await two.first.start(plain)
        await generation.close()
        assert two.first.core.active == 0
        await ended(two, plain.request_id)
        with pytest.raises(RequestFailed, match="cancelled"):
            await read((await two.second.attach(plain.request_id, TENANT)).generation)
        wanted = lingering(range(3, 30), max_tokens=50)
        generation = await two.first.start(wanted)
        await generation.close()
        await ended(two, wanted.request_id)
        assert len(await read((await two.second.attach(wanted.request_id, TENANT)).generation)) == 50
        await two.mesh.quiet()


async def test_after_an_empty_restart_of_the_store_owners_write_their_records_again() -> None:
    async with two_gateways() as two:
        wanted = replace(lingering(range(3, 30), max_tokens=200), idempotency=IdempotencyMark(key="k", digest=b"d"))
        expected = await undisturbed(two.second, replace(wanted, idempotency=None))
        assert await two.first.claim(IdempotencyMark(key="k", digest=b"d"), wanted.request_id) == wanted.request_id
        await read(await two.first.start(wanted), until=3)
        for key in await two.mesh.store.keys(""):
            if ":model:" not in key:
                await two.mesh.store.delete(key)
        async with asyncio.timeout(5):
            while await stored(two, wanted.request_id) is None:
                await asyncio.sleep(0.02)
        assert await two.second.claim(IdempotencyMark(key="k", digest=b"d"), RequestId("other")) == wanted.request_id
        die(two, "g0")
        assert seen(await read((await two.second.attach(wanted.request_id, TENANT)).generation)) == expected


async def test_an_idempotency_key_has_one_request_on_all_gateways() -> None:
    async with two_gateways() as two:
        mark = IdempotencyMark(key="k", digest=b"d")
        names = [RequestId(f"r{index}") for index in range(8)]
        holders = await asyncio.gather(*((two.first, two.second)[i % 2].claim(mark, name) for i, name in enumerate(names)))
        assert len(set(holders)) == 1
        with pytest.raises(IdempotencyKeyReused):
            await two.second.claim(IdempotencyMark(key="k", digest=b"other"), RequestId("x"))
        await two.first.release(mark, RequestId("not the holder"))
        assert await two.second.claim(mark, RequestId("x")) == holders[0]
        await two.first.release(mark, holders[0])
        assert await two.second.claim(mark, RequestId("x")) == "x"
        two.mesh.store.set_available(False)
        with pytest.raises(StoreUnavailable):
            await two.first.claim(mark, RequestId("y"))
        two.mesh.store.set_available(True)
