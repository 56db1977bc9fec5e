"""Two hosts, prefill workers, gateways and brokers on one and decode workers on the other, and what happens to networks."""

import asyncio
from collections.abc import Sequence

from tests.faults.fault import Act, Fault
from tests.faults.fault_mesh import FaultMesh
from tests.faults.two_hosts import Wire, why_not_two_hosts
from tests.faults.world import TWO_HOSTS

GROUP = "two hosts"
PARTITION_S = 2.0


def host_faults() -> list[Fault]:
    """None where there cannot be two hosts."""
    if why_not_two_hosts() is not None:
        return []
    return [
        _between_hosts("nothing happens between two hosts"),
        _between_hosts("partition for 2 s", inject=_partition),
        _between_hosts("partition until all streams have ended", inject=_partition_for_good),
        _between_hosts("5 % of packets lost", before=_weather(loss=0.05), inject=_until_ended),
        _between_hosts("50 ms of delay there and back", before=_weather(delay_s=0.025), inject=_until_ended),
        _between_hosts("5 % lost, 50 ms of delay", before=_weather(loss=0.05, delay_s=0.025), inject=_until_ended),
    ]


def _between_hosts(name: str, *, before: Act | None = None, inject: Act | None = None) -> Fault:
    return Fault(name=name, group=GROUP, world=TWO_HOSTS, before=before, inject=inject)


def _wire(mesh: FaultMesh) -> Wire:
    assert mesh.wire is not None
    return mesh.wire


async def _partition(mesh: FaultMesh) -> Sequence[str]:
    wire = _wire(mesh)
    wire.is_cut = True
    await asyncio.sleep(PARTITION_S)
    wire.heal()
    return _dropped(wire)


async def _partition_for_good(mesh: FaultMesh) -> Sequence[str]:
    wire = _wire(mesh)
    wire.is_cut = True
    await mesh.others_ended.wait()
    wire.heal()
    return _dropped(wire)


def _weather(*, loss: float = 0.0, delay_s: float = 0.0) -> Act:
    """The delay is that of one direction."""

    async def begin(mesh: FaultMesh) -> Sequence[str]:
        wire = _wire(mesh)
        wire.loss, wire.delay_s, wire.dropped = loss, delay_s, 0
        return ()

    return begin


async def _until_ended(mesh: FaultMesh) -> Sequence[str]:
    wire = _wire(mesh)
    loss = wire.loss
    await mesh.others_ended.wait()
    wire.heal()
    return _dropped(wire) if loss else ()


def _dropped(wire: Wire) -> Sequence[str]:
    dropped, wire.dropped = wire.dropped, 0
    return () if dropped else ("the network dropped no packet",)
