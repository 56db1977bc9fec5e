"""Two brokers' worlds under one face, for the contract of the broker port: the in-memory hub, and a real nats-server."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol

from common.adapters.memory_broker import MemoryBroker, MemoryHub
from common.adapters.nats_broker import NatsBroker
from common.ports.broker import Broker, Message
from tests.servers import RunningServer, running_nats

WAIT_S = 30.0
"""How long a test waits for what must come; it never has to where the code is right."""


class BrokerWorld(Protocol):
    """A server, and the clients that were made of it (closed at the end)."""

    async def connect(self, *, on_state: Callable[[bool], None] | None = None, max_outbox_bytes: int = 16 << 20) -> Broker: ...
    async def stop(self) -> None: ...
    async def start(self) -> None: ...


class MemoryWorld:
    def __init__(self) -> None:
        self._hub = MemoryHub()
        self.brokers: list[MemoryBroker] = []

    async def connect(self, *, on_state: Callable[[bool], None] | None = None, max_outbox_bytes: int = 16 << 20) -> Broker:
        broker = self._hub.connect(on_state=on_state, max_outbox_bytes=max_outbox_bytes)
        self.brokers.append(broker)
        return broker

    async def stop(self) -> None:
        self._hub.stop()

    async def start(self) -> None:
        self._hub.start()


class NatsWorld:
    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self.brokers: list[NatsBroker] = []

    async def connect(self, *, on_state: Callable[[bool], None] | None = None, max_outbox_bytes: int = 16 << 20) -> Broker:
        broker = await NatsBroker.connect([self._server.url], name="test", on_state=on_state, max_outbox_bytes=max_outbox_bytes)
        self.brokers.append(broker)
        return broker

    async def stop(self) -> None:
        await self._server.kill()

    async def start(self) -> None:
        await self._server.start()


@asynccontextmanager
async def broker_world(kind: str) -> AsyncIterator[BrokerWorld]:
    if kind == "memory":
        memory = MemoryWorld()
        yield memory
        for broker in memory.brokers:
            await broker.close()
        return
    async with running_nats() as server:
        world = NatsWorld(server)
        try:
            yield world
        finally:
            for nats in world.brokers:
                await nats.close()


class Inbox:
    """Collects what a handler gets, and lets a test wait for a number of messages."""

    def __init__(self, answer: bytes | None = None) -> None:
        self.received: list[tuple[str, bytes]] = []
        self._answer = answer
        self._changed = asyncio.Event()

    def __call__(self, message: Message) -> None:
        self.received.append((message.subject, message.payload))
        self._changed.set()
        if self._answer is not None:
            message.respond(self._answer)

    @property
    def payloads(self) -> list[bytes]:
        return [payload for _, payload in self.received]

    async def wait_for(self, count: int) -> None:
        async with asyncio.timeout(WAIT_S):
            while len(self.received) < count:
                self._changed.clear()
                await self._changed.wait()


class States:
    """Collects what `on_state` is told."""

    def __init__(self) -> None:
        self.seen: list[bool] = []
        self._changed = asyncio.Event()

    def __call__(self, connected: bool) -> None:
        self.seen.append(connected)
        self._changed.set()

    async def wait_for(self, *expected: bool) -> None:
        async with asyncio.timeout(WAIT_S):
            while tuple(self.seen) != expected:
                self._changed.clear()
                await self._changed.wait()
