"""The laws of control connections, over TCP and in memory; and, over TCP, what strangers get: nothing, and counted."""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from common.adapters.memory_peers import MemoryPeerHub, MemoryPeerNetwork
from common.adapters.peer_network import TcpPeerNetwork
from common.adapters.tcp_handshake import NONCE_BYTES, OPENING_BYTES, OPENING_MAGIC, PROOF_BYTES, Handshake
from common.ports.peers import PeerConnection
from common.values.errors import PeerError

KEY = b"k" * 32
SMALL_OUTBOX = 256 << 10
KINDS = ["tcp", "memory"]


@dataclass(eq=False)
class Ear:
    """Remembers what a connection delivered."""

    connection: PeerConnection
    messages: list[bytes] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def listen(self) -> "Ear":
        self.connection.listen(self._hear, self._lose)
        return self

    def _hear(self, message: bytes) -> None:
        self.messages.append(message)
        self._changed.set()

    def _lose(self, reason: str) -> None:
        self.lost.append(reason)
        self._changed.set()

    async def until(self, *, messages: int = 0, lost: int = 0) -> None:
        async with asyncio.timeout(20):
            while len(self.messages) < messages or len(self.lost) < lost:
                self._changed.clear()
                await self._changed.wait()


@dataclass(kw_only=True)
class Two:
    """Two networks with one connection."""

    here: PeerConnection
    there: PeerConnection


def networks(kind: str, *keys: bytes) -> list[TcpPeerNetwork] | list[MemoryPeerNetwork]:
    if kind == "tcp":
        return [TcpPeerNetwork(key, "127.0.0.1", outbox_bytes=SMALL_OUTBOX, handshake_timeout_s=0.3) for key in keys]
    hub = MemoryPeerHub()
    return [MemoryPeerNetwork(hub, key, outbox_bytes=SMALL_OUTBOX) for key in keys]


@contextlib.asynccontextmanager
async def connected(kind: str) -> AsyncIterator[Two]:
    one, other = networks(kind, KEY, KEY)
    accepted: asyncio.Future[PeerConnection] = asyncio.get_running_loop().create_future()
    host, port = await other.listen(accepted.set_result)
    try:
        here = await one.dial(host, port, timeout_s=5)
        yield Two(here=here, there=await accepted)
    finally:
        await one.close()
        await other.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_messages_arrive_whole_and_in_order_both_ways(kind: str) -> None:
    async with connected(kind) as two:
        ear_there, ear_here = Ear(two.there).listen(), Ear(two.here).listen()
        messages = [bytes([number % 256]) * (number * number % 5000) for number in range(300)]
        for number, message in enumerate(messages):
            two.here.send(message)
            two.there.send(message[::-1])
            if number % 20 == 19:
                await ear_there.until(messages=number + 1)
                await ear_here.until(messages=number + 1)
        assert ear_there.messages == messages
        assert ear_here.messages == [message[::-1] for message in messages]


@pytest.mark.parametrize("kind", KINDS)
async def test_what_came_before_listening_comes_first_the_loss_last_and_once(kind: str) -> None:
    async with connected(kind) as two:
        for number in range(10):
            two.here.send(bytes([number]))
        await two.here.close()
        await asyncio.sleep(0.05)
        ear = Ear(two.there).listen()
        await ear.until(messages=10, lost=1)
        two.there.send(b"into the void")
        await two.there.close()
        await asyncio.sleep(0.01)
        assert ear.messages == [bytes([number]) for number in range(10)]
        assert len(ear.lost) == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_our_own_closing_is_no_loss(kind: str) -> None:
    async with connected(kind) as two:
        here, there = Ear(two.here).listen(), Ear(two.there).listen()
        await two.here.close()
        await two.here.close()
        await there.until(lost=1)
        assert here.lost == []


@pytest.mark.parametrize("kind", KINDS)
async def test_a_peer_that_does_not_read_loses_its_connection_and_memory_stays_bounded(kind: str) -> None:
    async with connected(kind) as two:
        ear = Ear(two.here).listen()
        if kind == "tcp":
            two.there._transport.pause_reading()  # type: ignore[attr-defined]
        for _ in range(2000):
            two.here.send(bytes(64 << 10))
        await ear.until(lost=1)
        assert "outbox" in ear.lost[0]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_peer_with_another_key_is_refused_and_counted(kind: str) -> None:
    one, other = networks(kind, b"x" * 32, KEY)
    reached: list[PeerConnection] = []
    host, port = await other.listen(reached.append)
    with pytest.raises(PeerError):
        await one.dial(host, port, timeout_s=5)
    await asyncio.sleep(0.01)
    assert reached == []
    assert sum(other.rejected.values()) == 1
    await one.close()
    await other.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_nobody_there_is_a_peer_error(kind: str) -> None:
    one, other = networks(kind, KEY, KEY)
    host, port = await other.listen(lambda _: None)
    await other.close()
    with pytest.raises(PeerError):
        await one.dial(host, port, timeout_s=5)
    await one.close()


async def test_a_big_message_passes_and_a_bigger_one_is_refused_where_it_is_made() -> None:
    one, other = TcpPeerNetwork(KEY, "127.0.0.1"), TcpPeerNetwork(KEY, "127.0.0.1")
    accepted: asyncio.Future[PeerConnection] = asyncio.get_running_loop().create_future()
    host, port = await other.listen(accepted.set_result)
    here = await one.dial(host, port, timeout_s=5)
    ear = Ear(await accepted).listen()
    with pytest.raises(ValueError, match="limit"):
        here.send(bytes((64 << 20) + 1))
    here.send(bytes(32 << 20))
    await ear.until(messages=1)
    assert len(ear.messages[0]) == 32 << 20
    await one.close()
    await other.close()


@pytest.mark.parametrize("garbage", [b"", b"SEG", b"GET / HTTP/1.1\r\nHost: segue.example.org\r\nAccept: */*\r\n\r\n"])
async def test_garbage_and_slow_strangers_are_closed_and_counted(garbage: bytes) -> None:
    network = TcpPeerNetwork(KEY, "127.0.0.1", handshake_timeout_s=0.2)
    reached: list[PeerConnection] = []
    host, port = await network.listen(reached.append)
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(garbage)
    async with asyncio.timeout(20):
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
    writer.close()
    assert sum(network.rejected.values()) == 1
    assert reached == []
    await network.close()


async def test_a_reflected_or_replayed_proof_proves_nothing() -> None:
    network = TcpPeerNetwork(KEY, "127.0.0.1")
    reached: list[PeerConnection] = []
    host, port = await network.listen(reached.append)

    async def attempt(proof: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(OPENING_MAGIC + b"n" * NONCE_BYTES)
        await reader.readexactly(OPENING_BYTES)
        writer.write(proof)
        async with asyncio.timeout(20):
            with contextlib.suppress(ConnectionError):
                return await reader.read()
        return b""

    earlier = Handshake(KEY, "client", "segue control 1", b"n" * NONCE_BYTES)
    recorded = earlier.receive(OPENING_MAGIC + b"s" * NONCE_BYTES)
    assert await attempt(recorded) == b""
    assert await attempt(bytes(PROOF_BYTES)) == b""
    assert reached == []
    await network.close()


def test_both_sides_of_a_handshake_prove_the_key_and_only_in_their_own_role() -> None:
    client, server = (Handshake(KEY, role, "p", role[:1].encode() * NONCE_BYTES) for role in ("client", "server"))
    client_proof = client.receive(server.receive(client.opening()))
    with pytest.raises(PeerError):
        Handshake.receive(client, client_proof)
    server_proof = server.receive(client_proof)
    assert client.receive(server_proof) == b""
    assert client.done
    assert server.done
    elsewhere = Handshake(KEY, "server", "another purpose", b"s" * NONCE_BYTES)
    elsewhere.receive(client.opening())
    with pytest.raises(PeerError):
        elsewhere.receive(client_proof)


async def test_an_impossible_length_breaks_the_connection() -> None:
    async with connected("tcp") as two:
        ear = Ear(two.there).listen()
        two.here._transport.write(struct.pack("<I", 1 << 31))  # type: ignore[attr-defined]
        await ear.until(lost=1)
        assert "announced" in ear.lost[0]
