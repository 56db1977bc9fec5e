"""Control connections between workers of one process: for tests, checked by the same contract as the real ones.

Messages pass through the event loop, never within `send`, so callbacks run in the same order and depth as over TCP.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable

from common.ports.peers import PeerConnection
from common.values.errors import PeerError

MAX_FRAME_BYTES = 64 << 20
OUTBOX_BYTES = 64 << 20


class MemoryPeerHub:
    """The addresses at which networks listen."""

    def __init__(self) -> None:
        self._listening: dict[int, MemoryPeerNetwork] = {}
        self._last_port = 0

    def listen(self, network: "MemoryPeerNetwork") -> int:
        self._last_port += 1
        self._listening[self._last_port] = network
        return self._last_port

    def leave(self, network: "MemoryPeerNetwork") -> None:
        self._listening = {port: other for port, other in self._listening.items() if other is not network}

    def find(self, port: int) -> "MemoryPeerNetwork | None":
        return self._listening.get(port)


class MemoryPeerNetwork:
    """One worker's network on a hub."""

    def __init__(self, hub: MemoryPeerHub, cluster_key: bytes = b"in one process", *, outbox_bytes: int = OUTBOX_BYTES) -> None:
        self._hub = hub
        self._key = cluster_key
        self._outbox_bytes = outbox_bytes
        self._on_connection: Callable[[PeerConnection], None] | None = None
        self._connections: list[MemoryPeerConnection] = []
        self.rejected: Counter[str] = Counter()

    async def listen(self, on_connection: Callable[[PeerConnection], None]) -> tuple[str, int]:
        self._on_connection = on_connection
        return "memory", self._hub.listen(self)

    async def dial(self, host: str, port: int, *, timeout_s: float) -> PeerConnection:
        await asyncio.sleep(0)
        there = self._hub.find(port)
        if there is None:
            raise PeerError(f"no control connection to {host}:{port}: nobody listens")
        here = MemoryPeerConnection(f"memory:{port}", self._outbox_bytes)
        there.accept(here, self._key)
        self._connections.append(here)
        return here

    def accept(self, dialled: "MemoryPeerConnection", key: bytes) -> None:
        """Raises PeerError where the dialling side does not know our key."""
        if key != self._key or self._on_connection is None:
            self.rejected["the peer does not know the secret"] += 1
            raise PeerError("no control connection: the peer does not know the secret")
        accepted = MemoryPeerConnection("memory:dialled", self._outbox_bytes)
        dialled.join(accepted)
        accepted.join(dialled)
        self._connections.append(accepted)
        self._on_connection(accepted)

    async def close(self) -> None:
        self._hub.leave(self)
        for connection in self._connections:
            await connection.close()
        self._connections.clear()


class MemoryPeerConnection:
    """One end of a connection."""

    def __init__(self, address: str, outbox_bytes: int) -> None:
        self._address = address
        self._outbox_bytes = outbox_bytes
        self._peer: MemoryPeerConnection | None = None
        self._inbox: deque[bytes] = deque()
        self._inbox_bytes = 0
        self._on_message: Callable[[bytes], None] | None = None
        self._on_lost: Callable[[str], None] | None = None
        self._reason: str | None = None
        self._closed = False

    @property
    def address(self) -> str:
        return self._address

    def join(self, peer: "MemoryPeerConnection") -> None:
        self._peer = peer

    def send(self, payload: bytes) -> None:
        if len(payload) > MAX_FRAME_BYTES:
            raise ValueError(f"a message of {len(payload)} bytes; the limit is {MAX_FRAME_BYTES}")
        if self._peer is None or self._closed or self._reason is not None:
            return
        if self._peer.waiting_bytes + len(payload) > self._outbox_bytes:
            self._peer.lose("the peer closed the connection")
            self.lose("the outbox is full: the peer does not read")
            return
        self._peer.put(payload)

    @property
    def waiting_bytes(self) -> int:
        return self._inbox_bytes

    def put(self, payload: bytes) -> None:
        """The other end sent this."""
        self._inbox.append(payload)
        self._inbox_bytes += len(payload)
        asyncio.get_running_loop().call_soon(self._deliver)

    def listen(self, on_message: Callable[[bytes], None], on_lost: Callable[[str], None]) -> None:
        if self._on_message is not None:
            raise RuntimeError("listen is called once")
        self._on_message = on_message
        self._on_lost = on_lost
        asyncio.get_running_loop().call_soon(self._deliver)

    def lose(self, reason: str) -> None:
        """The connection is gone, after what came before."""
        if self._reason is None:
            self._reason = reason
            asyncio.get_running_loop().call_soon(self._deliver)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._inbox.clear()
        if self._peer is not None:
            self._peer.lose("the peer closed the connection")
        await asyncio.sleep(0)

    def _deliver(self) -> None:
        if self._on_message is None or self._on_lost is None:
            return
        while self._inbox and not self._closed:
            payload = self._inbox.popleft()
            self._inbox_bytes -= len(payload)
            self._on_message(payload)
        if self._reason is not None and not self._closed:
            self._closed = True
            self._on_lost(self._reason)
