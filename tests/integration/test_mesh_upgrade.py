"""A mesh is upgraded to the next release and rolled back, one process after another, while it serves."""

import asyncio

import pytest

from common.protocol.wire_version import WIRE_VERSION
from common.values.errors import Unavailable
from services.gateway.mesh_client import LiveMesh
from tests.mesh_in_memory import MeshInMemory, collect, request, running_mesh, tokens

ROLES = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
PROMPT = [5, 6, 7, 8, 9, 10, 11]


async def answers(gateways: list[LiveMesh]) -> list[list[int]]:
    asked = (collect(gateway, request(PROMPT, max_tokens=24)) for gateway in gateways for _ in range(3))
    return [tokens(events[0]) for events in await asyncio.gather(*asked)]


async def replace(mesh: MeshInMemory, name: str, version: int) -> None:
    await mesh.workers[name].stop()
    await mesh.start_worker(name, ROLES[name], version=version)  # type: ignore[arg-type]


async def test_a_mesh_is_upgraded_and_rolled_back_while_it_serves() -> None:
    following = WIRE_VERSION + 1
    async with running_mesh() as mesh:
        for name, role in ROLES.items():
            await mesh.start_worker(name, role)  # type: ignore[arg-type]
        gateways = [await mesh.start_gateway("g0")]
        await mesh.settled(gateways[0])
        (expected, *others) = await answers(gateways)
        assert all(other == expected for other in others)
        for version in (following, WIRE_VERSION):
            gateways.append(await mesh.start_gateway(f"g-of-{version}-{len(gateways)}", version=version))
            await mesh.settled(gateways[-1])
            for name in ROLES:
                during = asyncio.create_task(answers(gateways))
                await replace(mesh, name, version)
                for gateway in gateways:
                    await mesh.settled(gateway)
                assert all(answer == expected for answer in await during)
                assert all(answer == expected for answer in await answers(gateways))
        await mesh.quiet()
        for part in (*gateways, *(worker.service for worker in mesh.workers.values())):
            assert not part.refusals.counts
        moved = sum(worker.service.core.desk.counters.settled["moved"] for worker in mesh.workers.values())
        assert moved, "KV went from one release to another"


@pytest.mark.parametrize("distance", [-2, 2])
async def test_a_member_of_a_distant_release_is_left_alone_and_counted(distance: int) -> None:
    async with running_mesh() as mesh:
        gateway = await mesh.start_gateway()
        stranger = await mesh.start_worker("b0", "both", version=WIRE_VERSION + distance)
        await stranger.ready.wait()
        async with asyncio.timeout(10):
            while not gateway.refusals.counts["version"]:
                await asyncio.sleep(0.02)
        with pytest.raises(Unavailable):
            await gateway.start(request(PROMPT))
        ours = await mesh.start_worker("b1", "both")
        await ours.ready.wait()
        async with asyncio.timeout(10):
            while not gateway.cards():
                await asyncio.sleep(0.02)
        assert len(tokens((await collect(gateway, request(PROMPT)))[0])) == 8
        assert ours.service.refusals.counts["version"]
        assert [str(snapshot.worker) for snapshot in gateway.core.registry.all()] == ["b1"]
