"""A worker's connections to the others of its group, with a peer that is slow to say hello, or leaves before it was tried."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from common.adapters.memory_peers import MemoryPeerHub, MemoryPeerNetwork
from common.adapters.memory_transport import MemoryTransport, MemoryTransportHub
from common.ports.peers import PeerConnection
from common.protocol.messages import Hello, encode
from common.runtime.message_refusals import MessageRefusals
from common.runtime.peer_links import PeerLinks
from common.values.ids import Incarnation, ModelKey, WorkerId
from common.values.kv_layout import Fingerprint
from common.values.worker import WorkerSnapshot
from tests.mesh_in_memory import LAYOUT

MODEL = ModelKey("m", "1")
FINGERPRINT = Fingerprint(weights="w", dtype="float32", layout=LAYOUT)


def announcement(worker: str, port: int = 0) -> WorkerSnapshot:
    return WorkerSnapshot(
        worker=WorkerId(worker),
        incarnation=Incarnation("1"),
        model=MODEL,
        role="both",
        state="ready",
        sequence_number=1,
        control_host="memory",
        control_port=port,
        fingerprint=FINGERPRINT,
        max_model_len=100,
        max_num_seqs=4,
        blocks_total=8,
        blocks_free=8,
        blocks_cached=0,
    )


class Side:
    """The links of worker `m`, and one peer that is played by the test."""

    def __init__(self, tasks: asyncio.TaskGroup, transport: MemoryTransport, hub: MemoryPeerHub) -> None:
        self.joined: list[WorkerId] = []
        self.lost: list[WorkerId] = []
        self.hello = Hello(worker="m", incarnation="1", model=MODEL, fingerprint=FINGERPRINT, transport=transport.offer())
        self.links = PeerLinks(
            hello=self.hello,
            network=MemoryPeerNetwork(hub),
            transport=transport,
            tasks=tasks,
            strict_kernels=False,
            refusals=MessageRefusals(),
            on_joined=self.joined.append,
            on_message=lambda worker, message: None,
            on_lost=self.lost.append,
        )
        self.network = MemoryPeerNetwork(hub)
        self.calls: list[PeerConnection] = []

    def hello_of(self, worker: str) -> bytes:
        return encode(
            Hello(worker=worker, incarnation="1", model=MODEL, fingerprint=FINGERPRINT, transport=self.hello.transport),
        )


@asynccontextmanager
async def side() -> AsyncIterator[Side]:
    transport = MemoryTransport(MemoryTransportHub())
    await transport.start(LAYOUT, 8)
    async with asyncio.TaskGroup() as tasks:
        made = Side(tasks, transport, MemoryPeerHub())
        try:
            yield made
        finally:
            await made.links.close()
            await made.network.close()
    await transport.close()


async def test_a_peer_that_is_slow_to_say_hello_is_called_once() -> None:
    """Snapshots come many times a second; a second call would end the first connection, and what runs over it."""
    async with side() as it:
        _, port = await it.network.listen(it.calls.append)
        async with asyncio.timeout(5):
            for _ in range(50):
                it.links.announced(announcement("z", port), gone=False)
                await asyncio.sleep(0.002)
            (connection,) = it.calls
            connection.listen(lambda payload: None, lambda reason: None)
            connection.send(it.hello_of("z"))
            while not it.joined:
                await asyncio.sleep(0.002)
                it.links.announced(announcement("z", port), gone=False)
        assert len(it.calls) == 1
        assert it.links.tiers() == {"z": "memory"}
        assert it.lost == []


async def test_nobody_waits_for_a_peer_that_has_left() -> None:
    """The peer with the lower id would have called."""
    async with side() as it, asyncio.timeout(5):
        it.links.announced(announcement("a"), gone=False)
        waiting = asyncio.create_task(it.links.wait_until_tried(settle_s=0.0, timeout_s=60.0))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        it.links.announced(announcement("a"), gone=True)
        await waiting


async def test_a_peer_that_cannot_pair_is_shown_until_it_leaves() -> None:
    async with side() as it, asyncio.timeout(5):
        _, port = await it.network.listen(it.calls.append)
        it.links.announced(announcement("z", port), gone=False)
        while not it.calls:
            await asyncio.sleep(0.002)
        it.calls[0].listen(lambda payload: None, lambda reason: None)
        other = Hello(worker="z", incarnation="1", model=ModelKey("other", "1"), fingerprint=FINGERPRINT, transport=b"")
        it.calls[0].send(encode(other))
        await it.links.wait_until_tried(settle_s=0.0, timeout_s=60.0)
        assert it.links.unpaired == {"z": "model"}
        it.links.announced(announcement("z", port), gone=True)
        assert it.links.unpaired == {}


async def test_a_peer_of_another_dtype_is_shown_with_that_field() -> None:
    async with side() as it, asyncio.timeout(5):
        _, port = await it.network.listen(it.calls.append)
        it.links.announced(announcement("z", port), gone=False)
        while not it.calls:
            await asyncio.sleep(0.002)
        it.calls[0].listen(lambda payload: None, lambda reason: None)
        narrow = replace(FINGERPRINT, dtype="bfloat16", layout=replace(FINGERPRINT.layout, dtype="bfloat16"))
        it.calls[0].send(encode(Hello(worker="z", incarnation="1", model=MODEL, fingerprint=narrow, transport=b"")))
        await it.links.wait_until_tried(settle_s=0.0, timeout_s=60.0)
        assert it.links.unpaired == {"z": "dtype"}
        assert it.joined == []
