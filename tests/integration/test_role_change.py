"""A worker that is given another role while it serves: what runs moves or ends here, no token is lost or doubled, and what comes
later is served by the new role."""

import asyncio

import pytest

from common.engine.synthetic import StepTimes
from common.ports.generation import GenerationRequest, TokenEvent
from common.protocol.messages import RoleChange, encode
from common.values.ids import WorkerId
from common.values.worker import Role
from services.gateway.mesh_client import LiveMesh
from tests.mesh_in_memory import MeshInMemory, collect, request, running_mesh, tokens

SLOW = StepTimes(fixed=0.02)
LENGTH = 60


async def stream(gateway: LiveMesh, wanted: GenerationRequest, seen: list[TokenEvent], begun: asyncio.Event) -> None:
    generation = await gateway.start(wanted)
    while batch := await generation.next_events():
        seen.extend(batch)
        if len(seen) >= 8:
            begun.set()
    await generation.close()


def tell(mesh: MeshInMemory, worker: str, role: Role, decision: int) -> None:
    """As the planner does."""
    broker = mesh.gateway_brokers["g0"]
    broker.publish(mesh.names.worker_inbox(WorkerId(worker)), encode(RoleChange(role=role, decision=decision)))


async def changed(mesh: MeshInMemory, worker: str, role: Role) -> None:
    async with asyncio.timeout(20):
        while mesh.workers[worker].service.core.role != role or mesh.workers[worker].service.core.changing:
            await asyncio.sleep(0.01)


async def streams_through(mesh: MeshInMemory, gateway: LiveMesh, changes: list[tuple[str, Role]], *, streams: int) -> None:
    """Streams run, roles change one after the other in their middle, every stream is what it is without that."""
    wanted = [request(range(3 + n, 30 + n), max_tokens=LENGTH) for n in range(streams)]
    seen: list[list[TokenEvent]] = [[] for _ in wanted]
    begun = [asyncio.Event() for _ in wanted]
    async with asyncio.TaskGroup() as tasks:
        for one, events, event in zip(wanted, seen, begun, strict=True):
            tasks.create_task(stream(gateway, one, events, event))
        for event in begun:
            await event.wait()
        for decision, (worker, role) in enumerate(changes, start=1):
            tell(mesh, worker, role, decision)
            await changed(mesh, worker, role)
    for one, events in zip(wanted, seen, strict=True):
        assert [event.index for event in events] == list(range(LENGTH))
        again = await collect(gateway, request(one.prompt, max_tokens=LENGTH))
        assert tokens(events) == tokens(again[0])
    assert gateway.core.counters["workers_lost"] == 0
    await mesh.quiet()


async def test_a_decode_worker_that_becomes_a_prefill_worker_hands_its_streams_on() -> None:
    async with running_mesh() as mesh:
        for name, role in (("p0", "prefill"), ("d0", "decode"), ("d1", "decode")):
            await mesh.start_worker(name, role, times=SLOW)  # type: ignore[arg-type]
        gateway = await mesh.start_gateway()
        await mesh.settled(gateway)
        await streams_through(mesh, gateway, [("d0", "prefill")], streams=4)
        core = mesh.workers["d0"].service.core
        assert core.role == "prefill"
        assert core.desk.counters.settled["moved"] >= 1
        assert core.counters.ended["handed_back"] == 0


async def test_roles_go_there_and_back_under_the_same_streams() -> None:
    async with running_mesh() as mesh:
        for name, role in (("p0", "prefill"), ("d0", "decode"), ("d1", "decode")):
            await mesh.start_worker(name, role, times=SLOW)  # type: ignore[arg-type]
        gateway = await mesh.start_gateway()
        await mesh.settled(gateway)
        await streams_through(mesh, gateway, [("d0", "prefill"), ("d0", "decode"), ("d1", "prefill"), ("p0", "decode")], streams=3)


@pytest.mark.parametrize("role", ["prefill", "both"])
async def test_where_nobody_else_decodes_streams_end_where_they_run(role: Role) -> None:
    async with running_mesh() as mesh:
        await mesh.start_worker("p0", "prefill", times=SLOW)
        await mesh.start_worker("d0", "decode", times=SLOW)
        gateway = await mesh.start_gateway()
        await mesh.settled(gateway)
        await streams_through(mesh, gateway, [("d0", role)], streams=2)
        assert mesh.workers["d0"].service.core.counters.tokens >= LENGTH


async def test_prompts_that_wait_go_back_where_another_worker_computes_prompts() -> None:
    async with running_mesh() as mesh:
        for name in ("p0", "p1"):
            await mesh.start_worker(name, "prefill", times=StepTimes(fixed=0.1), max_num_seqs=1)
        await mesh.start_worker("d0", "decode", times=SLOW)
        gateway = await mesh.start_gateway()
        await mesh.settled(gateway)
        wanted = [request(range(3 + n, 30 + n), max_tokens=8) for n in range(8)]
        async with asyncio.TaskGroup() as tasks:
            results = [tasks.create_task(collect(gateway, one)) for one in wanted]
            async with asyncio.timeout(20):
                while mesh.workers["p0"].service.core.load().waiting < 2:
                    await asyncio.sleep(0.01)
            tell(mesh, "p0", "decode", 1)
            await changed(mesh, "p0", "decode")
        assert all(len(tokens(result.result()[0])) == 8 for result in results)
        assert mesh.workers["p0"].service.core.counters.ended["handed_back"] >= 1
        assert gateway.core.counters["workers_lost"] == 0
        await mesh.quiet()


async def test_an_older_decision_changes_nothing() -> None:
    async with running_mesh() as mesh:
        await mesh.start_worker("b0", "both")
        gateway = await mesh.start_gateway()
        await mesh.settled(gateway)
        core = mesh.workers["b0"].service.core
        tell(mesh, "b0", "prefill", 7)
        await changed(mesh, "b0", "prefill")
        assert not core.change_role(RoleChange(role="decode", decision=7), 0.0)
        assert not core.change_role(RoleChange(role="decode", decision=3), 0.0)
        assert core.role == "prefill"
        assert core.role_decision == 7
