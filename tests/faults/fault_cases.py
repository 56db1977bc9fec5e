"""The faults: which process, at which point of a request's life, dies or freezes; and the brokers.

A failpoint fires inside the process at the named point, so no case depends on sleeping for the right moment.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.faults.fault_mesh import FaultMesh

FREEZE_S = 8.0
"""How long a frozen process stays so before it wakes up: well past every bound for noticing it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`armed` members start with a failpoint; `inject` runs beside the requests, once they are under way. `leaves` is a
    series of the workers' metrics that the fault must have raised, else it did not happen."""

    name: str
    armed: tuple[tuple[str, str], ...] = ()
    inject: Callable[[FaultMesh], Awaitable[None]] | None = None
    leaves: str | None = None
    is_everyday: bool = False


_PREFILL = ("dispatch.accepted", "prefill.step_started", "prefill.chunk_sealed", "offer.sent", "first_token.sent", "last.sent")
_DECODE = ("accept.sent", "pull.started", "pull.done", "last.received", "ack.sent", "decode.step", "log.appended")
_GATEWAY = ("gateway.dispatched", "gateway.first_token", "gateway.delivering")
_NTH = {"decode.step": 20, "gateway.delivering": 60, "log.appended": 2}
_EVERYDAY = {("d0", "decode.step", "kill"), ("p0", "prefill.step_started", "kill"), ("g0", "gateway.delivering", "kill")}


def faults() -> list[Fault]:
    members = (("p0", _PREFILL), ("d0", _DECODE), ("g0", _GATEWAY))
    return [
        *(_armed(name, point, action) for name, points in members for point in points for action in ("kill", "stop")),
        Fault(name="both prefill workers killed", armed=_both("p", "prefill.step_started")),
        Fault(name="both decode workers killed", armed=_both("d", "decode.step")),
        Fault(name="nats killed, back after 1 s", inject=_nats_restart),
        Fault(name="nats frozen for 3 s", inject=_nats_freeze),
        Fault(name="valkey killed, back empty after 1 s", inject=_valkey_restart),
        Fault(name="valkey frozen for 3 s", inject=_valkey_freeze),
        Fault(
            name="a KV byte flipped after its checksum",
            armed=(("p0", "kv.sealed=flip"), ("p1", "kv.sealed=flip")),
            leaves='segue_kv_blocks_pulled_total{kind="checksum"}',
        ),
        Fault(name="SIGTERM of a decode worker", inject=lambda mesh: mesh.restart("d0")),
        Fault(name="SIGTERM of a prefill worker", inject=lambda mesh: mesh.restart("p0")),
    ]


def _armed(name: str, point: str, action: str) -> Fault:
    nth = _NTH.get(point, 3)
    return Fault(
        name=f"{name} {'killed' if action == 'kill' else 'frozen'} at {point}",
        armed=((name, f"{point}={action}@{nth}"),),
        is_everyday=(name, point, action) in _EVERYDAY,
    )


def _both(letter: str, point: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"{letter}{n}", f"{point}=kill@{_NTH.get(point, 3)}") for n in (0, 1))


async def wake_frozen(mesh: FaultMesh) -> None:
    """Let what a failpoint stopped sleep for its time, then go on."""
    asleep: dict[str, float] = {}
    now = asyncio.get_running_loop().time
    while True:
        for name, member in mesh.members.items():
            if member.is_running and member.is_stopped and now() - asleep.setdefault(name, now()) > FREEZE_S:
                member.signal(signal.SIGCONT)
                del asleep[name]
        await asyncio.sleep(0.05)


async def _nats_restart(mesh: FaultMesh) -> None:
    await mesh.nats.kill()
    await asyncio.sleep(1.0)
    await mesh.nats.start()


async def _nats_freeze(mesh: FaultMesh) -> None:
    mesh.nats.freeze()
    await asyncio.sleep(3.0)
    mesh.nats.thaw()


async def _valkey_restart(mesh: FaultMesh) -> None:
    await mesh.valkey.kill()
    await asyncio.sleep(1.0)
    await mesh.valkey.start()


async def _valkey_freeze(mesh: FaultMesh) -> None:
    mesh.valkey.freeze()
    await asyncio.sleep(3.0)
    mesh.valkey.thaw()
