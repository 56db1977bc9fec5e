"""The faults: which process, at which point of a request's life, dies or freezes; and the brokers.

A failpoint fires inside the process at the named point, so no case depends on sleeping for the right moment.
"""

import asyncio
from collections.abc import Sequence

from tests.faults.abort_cases import abort_faults
from tests.faults.fault import Act, Fault
from tests.faults.fault_mesh import FaultMesh
from tests.faults.host_cases import host_faults
from tests.faults.model_file_cases import model_file_faults
from tests.faults.poison_cases import poison_faults
from tests.faults.world_cases import world_faults

_PREFILL = ("dispatch.accepted", "prefill.step_started", "prefill.chunk_sealed", "offer.sent", "first_token.sent", "last.sent")
_DECODE = ("accept.sent", "pull.started", "pull.done", "last.received", "ack.sent", "decode.step", "log.appended")
_GATEWAY = ("gateway.dispatched", "gateway.first_token", "gateway.delivering")
_NTH = {"decode.step": 20, "gateway.delivering": 60, "log.appended": 2}
_EVERYDAY = {("d0", "decode.step", "kill"), ("p0", "prefill.step_started", "kill"), ("g0", "gateway.delivering", "kill")}


def faults() -> list[Fault]:
    """All; those of one world stand together, so that each world is started once."""
    every = [
        *_deaths(),
        *_broker_faults(),
        *abort_faults(),
        *poison_faults(),
        *model_file_faults(),
        *world_faults(),
        *host_faults(),
    ]
    worlds = list(dict.fromkeys(fault.world for fault in every))
    return sorted(every, key=lambda fault: worlds.index(fault.world))


def _deaths() -> list[Fault]:
    members = (("p0", _PREFILL), ("d0", _DECODE), ("g0", _GATEWAY))
    return [
        *(_armed(name, point, action) for name, points in members for point in points for action in ("kill", "stop")),
        Fault(name="both prefill workers killed", group="two at once", armed=_both("p", "prefill.step_started")),
        Fault(name="both decode workers killed", group="two at once", armed=_both("d", "decode.step")),
        Fault(
            name="a KV byte flipped after its checksum",
            group="wire",
            armed=(("p0", "kv.sealed=flip"), ("p1", "kv.sealed=flip")),
            leaves='segue_kv_blocks_pulled_total{kind="checksum"}',
        ),
        Fault(name="SIGTERM of a decode worker", group="drain", inject=_restart("d0")),
        Fault(name="SIGTERM of a prefill worker", group="drain", inject=_restart("p0")),
    ]


def _broker_faults() -> list[Fault]:
    group = "brokers"
    return [
        Fault(name="nats killed, back after 1 s", group=group, inject=_nats_restart),
        Fault(name="nats frozen for 3 s", group=group, inject=_nats_freeze),
        Fault(name="valkey killed, back empty after 1 s", group=group, inject=_valkey_restart),
        Fault(name="valkey frozen for 3 s", group=group, inject=_valkey_freeze),
    ]


def _armed(name: str, point: str, action: str) -> Fault:
    nth = _NTH.get(point, 3)
    role = {"p": "prefill worker", "d": "decode worker", "g": "gateway"}[name[0]]
    return Fault(
        name=f"{name} {'killed' if action == 'kill' else 'frozen'} at {point}",
        group=f"{role} {'killed' if action == 'kill' else 'frozen'}",
        armed=((name, f"{point}={action}@{nth}"),),
        is_everyday=(name, point, action) in _EVERYDAY,
    )


def _both(letter: str, point: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"{letter}{n}", f"{point}=kill@{_NTH.get(point, 3)}") for n in (0, 1))


def _restart(name: str) -> Act:
    async def restart(mesh: FaultMesh) -> Sequence[str]:
        await mesh.restart(name)
        return ()

    return restart


async def _nats_restart(mesh: FaultMesh) -> Sequence[str]:
    await mesh.nats.kill()
    await asyncio.sleep(1.0)
    await mesh.nats.start()
    return ()


async def _nats_freeze(mesh: FaultMesh) -> Sequence[str]:
    mesh.nats.freeze()
    await asyncio.sleep(3.0)
    mesh.nats.thaw()
    return ()


async def _valkey_restart(mesh: FaultMesh) -> Sequence[str]:
    await mesh.valkey.kill()
    await asyncio.sleep(1.0)
    await mesh.valkey.start()
    return ()


async def _valkey_freeze(mesh: FaultMesh) -> Sequence[str]:
    mesh.valkey.freeze()
    await asyncio.sleep(3.0)
    mesh.valkey.thaw()
    return ()
