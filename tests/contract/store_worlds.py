"""Two stores' worlds under one face, for the contract of the state store port: the in-memory twin, and a real valkey-server."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

from common.adapters.memory_store import MemoryStore
from common.adapters.redis_store import RedisStore
from common.ports.state_store import StateStore
from tests.servers import RunningServer, running_valkey


class StoreWorld(Protocol):
    """A server, two clients of it, its death and return (it comes back empty), and time."""

    first: StateStore
    second: StateStore

    async def stop(self) -> None: ...
    async def start(self) -> None: ...
    async def let_pass(self, seconds: float) -> None: ...


class MemoryStoreWorld:
    def __init__(self) -> None:
        self._clock = 0.0
        self._store = MemoryStore(lambda: self._clock)
        self.first: StateStore = self._store
        self.second: StateStore = self._store

    async def stop(self) -> None:
        self._store.set_available(False)

    async def start(self) -> None:
        self._store.set_available(True)

    async def let_pass(self, seconds: float) -> None:
        self._clock += seconds


class ValkeyWorld:
    def __init__(self, server: RunningServer, first: RedisStore, second: RedisStore) -> None:
        self._server = server
        self.first: StateStore = first
        self.second: StateStore = second

    async def stop(self) -> None:
        await self._server.kill()

    async def start(self) -> None:
        await self._server.start()

    async def let_pass(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@asynccontextmanager
async def store_world(kind: str) -> AsyncIterator[StoreWorld]:
    if kind == "memory":
        yield MemoryStoreWorld()
        return
    async with running_valkey() as server:
        first, second = [await RedisStore.connect([server.url], timeout_s=20) for _ in range(2)]
        yield ValkeyWorld(server, first, second)
        await first.close()
        await second.close()
