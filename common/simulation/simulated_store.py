"""The state store as processes see it: each operation is one action at the server, later, and its answer comes later still.

A server that is away refuses, is silent (what was sent is lost, and so is the asker's patience), is slow (what was given up
happens all the same), or comes back empty.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeVar, cast

from common.simulation.simulated_process import SimulatedProcess
from common.simulation.surroundings import Surroundings
from common.simulation.virtual_coroutine import Answered, Failed, Wait
from common.values.errors import InvariantBroken, StoreUnavailable

TIMEOUT_S = 1.0
StoreFault = Literal["refuses", "silent", "slow", "emptied"]
STORE_FAULTS: tuple[StoreFault, ...] = ("refuses", "silent", "slow", "emptied")
Answer = TypeVar("Answer")


@dataclass(slots=True)
class _Record:
    expires_at: float
    fields: dict[str, bytes] = field(default_factory=dict)
    entries: list[bytes] = field(default_factory=list)


class SimulatedStore:
    """The server. `cut` is a fault; `records` may be read by laws."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._away_until = 0.0
        self._fault: StoreFault = "refuses"
        self._cuts = 0
        self._records: dict[str, _Record] = {}

    def cut(self, seconds: float, fault: StoreFault) -> None:
        self._around.note("store", f"{fault} for {seconds:.2f} s")
        self._around.counts[f"store_{fault}"] += 1
        self._away_until, self._fault = self._around.now + seconds, fault
        if fault != "slow":
            self._cuts += 1
        if fault == "emptied":
            self._records.clear()

    def client(self, process: SimulatedProcess) -> "StoreClient":
        return StoreClient(self, process)

    def perform(self, process: SimulatedProcess, act: Callable[[], object], answered: Answered, failed: Failed) -> None:
        around, life, cuts = self._around, process.life, self._cuts
        fault = self._fault if around.now < self._away_until else None
        error = StoreUnavailable("the store is away")
        if fault in ("refuses", "emptied"):
            process.after(0.001, "store", partial(failed, error))
            return
        if fault == "silent":
            process.after(TIMEOUT_S, "store", partial(failed, error))
            return
        takes = around.random.uniform(0.05, 2.5 * TIMEOUT_S) if fault == "slow" else around.takes(around.strength.message_delay_s)
        sent_at = around.now

        def reach_server() -> None:
            lost = self._cuts != cuts
            answer = None if lost and around.random.random() < 0.5 else act()
            if process.life != life:
                return
            waited = around.now - sent_at
            if lost or waited > TIMEOUT_S:
                process.after(max(0.0, TIMEOUT_S - waited), "store", partial(failed, error))
            else:
                process.after(around.takes(around.strength.message_delay_s), "store", partial(answered, answer))

        around.schedule.after(takes, reach_server)

    # ------------------------------------------------------------------ what the server does

    def find(self, key: str) -> _Record | None:
        record = self._records.get(key)
        if record is not None and record.expires_at <= self._around.now:
            del self._records[key]
            return None
        return record

    def create(self, key: str, fields: Mapping[str, bytes], ttl_s: float) -> bool:
        if self.find(key) is not None:
            return False
        self.put(key, fields, ttl_s)
        return True

    def put(self, key: str, fields: Mapping[str, bytes], ttl_s: float) -> None:
        self._kept(key, ttl_s).fields.update(fields)

    def update_if(self, key: str, expected: Mapping[str, bytes], changes: Mapping[str, bytes], ttl_s: float) -> bool:
        record = self.find(key)
        if record is None or any(record.fields.get(name) != value for name, value in expected.items()):
            return False
        self.put(key, changes, ttl_s)
        return True

    def read(self, key: str) -> dict[str, bytes] | None:
        record = self.find(key)
        return None if record is None else dict(record.fields)

    def refresh(self, key: str, ttl_s: float) -> bool:
        if self.find(key) is None:
            return False
        self._kept(key, ttl_s)
        return True

    def delete(self, key: str) -> None:
        self._records.pop(key, None)

    def keys(self, prefix: str) -> list[str]:
        return [key for key in list(self._records) if key.startswith(prefix) and self.find(key) is not None]

    def append(self, lists: Mapping[str, Sequence[bytes]], ttl_s: float) -> dict[str, int]:
        for key, entries in lists.items():
            self._kept(key, ttl_s).entries.extend(entries)
        return {key: len(self._records[key].entries) for key in lists}

    def read_list(self, key: str) -> list[bytes]:
        record = self.find(key)
        return [] if record is None else list(record.entries)

    def _kept(self, key: str, ttl_s: float) -> _Record:
        if ttl_s <= 0.0:
            raise InvariantBroken(f"{key} would never expire, or at once")
        record = self.find(key)
        if record is None:
            record = self._records[key] = _Record(expires_at=0.0)
        record.expires_at = self._around.now + ttl_s
        return record


class StoreClient:
    """The StateStore port of one process."""

    def __init__(self, store: SimulatedStore, process: SimulatedProcess) -> None:
        self._store = store
        self._process = process

    async def create(self, key: str, fields: Mapping[str, bytes], *, ttl_s: float) -> bool:
        return await self._ask(partial(self._store.create, key, fields, ttl_s))

    async def put(self, key: str, fields: Mapping[str, bytes], *, ttl_s: float) -> None:
        return await self._ask(partial(self._store.put, key, fields, ttl_s))

    async def update_if(self, key: str, *, expected: Mapping[str, bytes], changes: Mapping[str, bytes], ttl_s: float) -> bool:
        return await self._ask(partial(self._store.update_if, key, expected, changes, ttl_s))

    async def read(self, key: str) -> dict[str, bytes] | None:
        return await self._ask(partial(self._store.read, key))

    async def refresh(self, key: str, *, ttl_s: float) -> bool:
        return await self._ask(partial(self._store.refresh, key, ttl_s))

    async def delete(self, key: str) -> None:
        return await self._ask(partial(self._store.delete, key))

    async def keys(self, prefix: str) -> list[str]:
        return await self._ask(partial(self._store.keys, prefix))

    async def append(self, lists: Mapping[str, Sequence[bytes]], *, ttl_s: float) -> dict[str, int]:
        return await self._ask(partial(self._store.append, lists, ttl_s))

    async def read_list(self, key: str) -> list[bytes]:
        return await self._ask(partial(self._store.read_list, key))

    async def ping(self, *, timeout_s: float) -> bool:
        return await self._ask(lambda: True)

    async def close(self) -> None:
        return None

    async def _ask(self, act: Callable[[], Answer]) -> Answer:
        return cast("Answer", await Wait(partial(self._store.perform, self._process, act)))
