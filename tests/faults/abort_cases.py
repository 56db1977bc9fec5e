"""Clients that leave in each phase of their request, many at once, and clients that hardly read.

The process at which a request is in the phase pauses there, and says so in its log; then its clients leave, and others
come. The cancel so meets the request in that phase, or races what ends it.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from tests.faults.fault import Act, Fault, armed
from tests.faults.fault_mesh import GATEWAYS, FaultMesh
from tests.faults.leaving_client import LeavingClient
from tests.faults.world import SMALL_POOLS

GROUP = "clients leave"
PREFILL, DECODE = ("p0", "p1"), ("d0", "d1")
LEAVING = 3
CROWD = 12
SLOW = 4
_PHASES = (
    ("queued", PREFILL, "dispatch.accepted", 1, 200),
    ("dispatched", GATEWAYS, "gateway.dispatched", 1, 200),
    ("prefilling", PREFILL, "prefill.step_started", 1, 200),
    ("offering", PREFILL, "offer.sent", 1, 200),
    ("offered", DECODE, "offer.received", 1, 200),
    ("transferring", DECODE, "pull.started", 1, 200),
    ("transferred", DECODE, "pull.done", 1, 200),
    ("landed", DECODE, "last.received", 1, 200),
    ("settling", PREFILL, "last.sent", 1, 200),
    ("decoding", DECODE, "decode.step", 20, 200),
    ("delivered", GATEWAYS, "gateway.delivering", 20, 200),
    ("finishing", DECODE, "end.sent", 1, 16),
)


def abort_faults() -> list[Fault]:
    return [
        *(
            Fault(
                name=f"{LEAVING} clients leave while {phase}",
                group=GROUP,
                armed=armed(names, f"{point}=pause@{nth}"),
                before=_leave_at(names, point, clients=LEAVING, tokens=tokens),
                is_everyday=phase == "transferring",
            )
            for phase, names, point, nth, tokens in _PHASES
        ),
        Fault(
            name="12 clients leave while preempted",
            group=GROUP,
            world=SMALL_POOLS,
            armed=armed(DECODE, "preempted=pause"),
            before=_leave_at(DECODE, "preempted", clients=CROWD, tokens=400),
        ),
        Fault(name="12 clients leave at once, beside others", group=GROUP, inject=_crowd_leaves),
        Fault(name="4 clients read a byte a while", group=GROUP, inject=_slow_readers),
    ]


def _leave_at(names: Sequence[str], point: str, *, clients: int, tokens: int) -> Act:
    async def leave(mesh: FaultMesh) -> Sequence[str]:
        passed = asyncio.create_task(mesh.passes(names, point))
        crowd = await _ask(mesh, clients, tokens=tokens)
        met = await passed
        _all_leave(crowd)
        return () if met else (f"nobody came to {point}",)

    return leave


async def _crowd_leaves(mesh: FaultMesh) -> Sequence[str]:
    crowd = await _ask(mesh, CROWD, tokens=200)
    await asyncio.gather(*(client.read_events(3) for client in crowd))
    _all_leave(crowd)
    return ()


async def _slow_readers(mesh: FaultMesh) -> Sequence[str]:
    """They stay until the others have ended."""
    crowd = await _ask(mesh, SLOW, tokens=400, n=2, logprobs=5)
    reading = [asyncio.create_task(client.read_slowly()) for client in crowd]
    try:
        await mesh.others_ended.wait()
    finally:
        _all_leave(crowd)
        for task in reading:
            task.cancel()
            with suppress(asyncio.CancelledError, ConnectionError):
                await task
    return ()


async def _ask(mesh: FaultMesh, number: int, *, tokens: int, **changes: int) -> list[LeavingClient]:
    urls = mesh.gateway_urls
    return list(await asyncio.gather(*(LeavingClient.ask(urls[turn % len(urls)], tokens=tokens, **changes) for turn in range(number))))


def _all_leave(crowd: Sequence[LeavingClient]) -> None:
    for turn, client in enumerate(crowd):
        client.leave(abruptly=turn % 2 == 0)
