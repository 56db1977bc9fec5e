"""What must hold after every fault: nothing lost, nothing wrong, nothing left behind."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import httpx
from redis.asyncio import Redis

from tests.faults.fault_client import Record
from tests.faults.fault_mesh import GATEWAYS, WORKERS, FaultMesh

BOUND_EVERY_S = 0.5
QUIET_WITHIN_S = 10.0
_BUSY = ("segue_sequences_waiting", "segue_sequences_running", "segue_sequences_held", "segue_leases")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`left` says what was not free, cached or zero within 10 s; `endless` are keys of the store that never expire; `unmet` is
    what the fault itself expected and did not find; `bound_s` is the watchdog's, the silence after which a worker was taken for
    lost, as the gateways stated it."""

    fault: str
    group: str
    streams: int
    lost: int
    wrong: int
    resumed: int
    deaths: int
    silence_s: float
    first_event_s: float
    bound_s: float
    left: tuple[str, ...]
    endless: int
    keys: int
    unmet: int
    notes: tuple[str, ...] = ()

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.wrong or self.left or self.endless or self.unmet)


def lost(records: Sequence[Record]) -> list[str]:
    return [f"{record.kind}: {record.error or 'no end'}" for record in records if not record.done]


def wrong(records: Sequence[Record], undisturbed: Sequence[Record]) -> list[str]:
    """Streams whose events, usage included, are not byte for byte those of an undisturbed run."""
    found = []
    for record, true in zip(records, undisturbed, strict=True):
        mine, other = record.by_choice(), true.by_choice()
        if record.done and mine != other:
            choice = next(choice for choice in (*other, *mine) if mine.get(choice) != other.get(choice))
            found.append(f"{record.kind}: choice {choice}: {_difference(mine.get(choice, []), other.get(choice, []))}")
    return found


def _difference(events: Sequence[str], true: Sequence[str]) -> str:
    for index, (mine, other) in enumerate(zip(events, true, strict=False)):
        if mine != other:
            return f"event {index}: {mine[:300]} instead of {other[:300]}"
    return f"{len(events)} events instead of {len(true)}"


async def left_behind(mesh: FaultMesh) -> list[str]:
    """Wait until every worker is quiet; what is still there after the bound."""
    deadline = time.monotonic() + QUIET_WITHIN_S
    while left := await _all_left(mesh):
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(0.2)
    return left


async def _all_left(mesh: FaultMesh) -> list[str]:
    at_workers = [problem for name in WORKERS for problem in await _not_quiet(mesh, name)]
    return at_workers + [problem for name in GATEWAYS for problem in await _still_owned(mesh, name)]


async def _not_quiet(mesh: FaultMesh, name: str) -> list[str]:
    metrics = await mesh.metrics(name)
    problems = [f"{name}: {metric} {metrics[metric]:g}" for metric in _BUSY if metrics.get(metric, 0.0)]
    whole = metrics["segue_kv_blocks_free"] + metrics["segue_kv_blocks_cached"]
    if whole != metrics["segue_kv_blocks"]:
        problems.append(f"{name}: {metrics['segue_kv_blocks'] - whole:g} blocks neither free nor cached")
    return problems


async def _still_owned(mesh: FaultMesh, name: str) -> list[str]:
    owned = await mesh.metric(name, "segue_mesh_requests")
    return [f"{name}: {owned:g} requests"] if owned else []


async def highest_bound_s(mesh: FaultMesh, until: asyncio.Event) -> float:
    """The watchdog's highest bound, as the gateways that answer state it from now on: it follows what it hears of the workers."""
    highest = await _stated_bound_s(mesh)
    while not until.is_set():
        with suppress(TimeoutError):
            await asyncio.wait_for(until.wait(), BOUND_EVERY_S)
        highest = max(highest, await _stated_bound_s(mesh))
    return highest


async def _stated_bound_s(mesh: FaultMesh) -> float:
    """0 where no gateway answers in time: one may be dead or frozen."""
    stated = [0.0]
    for name in GATEWAYS:
        with suppress(httpx.TransportError, TimeoutError):
            async with asyncio.timeout(BOUND_EVERY_S):
                stated.append(await mesh.metric(name, "segue_watchdog_lost_after_seconds"))
    return max(stated)


async def endless_keys(mesh: FaultMesh) -> tuple[int, int]:
    """Keys without a time to live, and all keys."""
    client = Redis.from_url(mesh.valkey.url)
    try:
        keys = [key async for key in client.scan_iter(count=1000)]
        return sum([await client.pttl(key) == -1 for key in keys]), len(keys)
    finally:
        await client.aclose()
