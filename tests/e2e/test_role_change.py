"""A worker process is told another role in the middle of streams, and told back: the client notices nothing."""

import asyncio

import pytest

from common.adapters.nats_broker import NatsBroker
from common.ports.generation import GenerationRequest, TokenEvent
from common.protocol.messages import RoleChange, encode
from common.protocol.subjects import Names
from common.values.ids import RequestId, WorkerId
from common.values.sampling import SamplingParameters
from common.values.worker import Role
from services.gateway.mesh_client import LiveMesh
from tests.e2e.real_mesh import RealMesh, make_mesh, mesh_client
from tests.servers import RunningServer

pytestmark = [pytest.mark.servers, pytest.mark.timeout(300)]
SYNTHETIC = ("--engine", "synthetic", "--kv-cache-memory", "64MiB", "--synthetic-step-s", "0.03")
LENGTH = 80


def wanted(number: int, round_name: str, model: str) -> GenerationRequest:
    return GenerationRequest(
        request_id=RequestId(f"{round_name}{number}"),
        model=model,
        prompt=tuple(range(3 + number, 60 + number)),
        sampling=SamplingParameters(max_tokens=LENGTH, seed=1, ignore_eos=True),
        choices=1,
    )


async def stream(client: LiveMesh, request: GenerationRequest, begun: asyncio.Event) -> list[TokenEvent]:
    seen: list[TokenEvent] = []
    generation = await client.start(request)
    while batch := await generation.next_events():
        seen.extend(batch)
        if len(seen) >= 8:
            begun.set()
    await generation.close()
    return seen


async def changed(mesh: RealMesh, client: LiveMesh, role: Role, decision: int) -> None:
    """Told as the planner tells it, acknowledged by the worker's snapshot."""
    planner = await NatsBroker.connect([mesh.nats_url], name="test-planner")
    planner.publish(Names(mesh.name).worker_inbox(WorkerId("d0")), encode(RoleChange(role=role, decision=decision)))
    await planner.ping(timeout_s=5.0)
    await planner.close()
    async with asyncio.timeout(30):
        while True:
            told = next(s for s in client.core.registry.all() if s.worker == "d0")
            if told.role == role and told.role_decision == decision and not told.changing:
                return
            await asyncio.sleep(0.05)


async def test_a_worker_changes_its_role_under_running_streams(nats_server: RunningServer, valkey_server: RunningServer) -> None:
    mesh = make_mesh(nats_server.url, valkey_server.url)
    try:
        for name, role in (("p0", "prefill"), ("d0", "decode"), ("d1", "decode")):
            mesh.start_worker(name, role, *SYNTHETIC)
        async with mesh_client(mesh) as client:
            await mesh.settled()
            model = client.cards()[0].model.name
            begun = [asyncio.Event() for _ in range(4)]
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(stream(client, wanted(n, "changed", model), begun[n])) for n in range(4)]
                for event in begun:
                    await event.wait()
                await changed(mesh, client, "prefill", 1)
                await changed(mesh, client, "decode", 2)
            alone = [await stream(client, wanted(n, "quiet", model), asyncio.Event()) for n in range(4)]
            for one, other in zip(running, alone, strict=True):
                events = one.result()
                assert [event.index for event in events] == list(range(LENGTH))
                assert [event.token for event in events] == [event.token for event in other]
            assert client.core.counters["workers_lost"] == 0
            assert all(process.poll() is None for process in mesh.processes.values())
    finally:
        mesh.stop()
