"""Control connections over TCP: authenticated, ordered, each message whole, never blocking whoever sends.

A connection begins with the mutual handshake of `tcp_handshake`, over the mesh's cluster key; until it is over nothing is
kept of a stranger but 72 bytes, and not for long. Then frames: u32 length, payload. The outbox is bounded in bytes: a peer
that does not read loses its connection, it does not fill our memory. Whether a silent peer lives is for the layer above to
say, which sends something each second.
"""

import asyncio
import secrets
import socket
import struct
from collections import Counter, deque
from collections.abc import Callable
from typing import cast

from common.adapters.tcp_handshake import NONCE_BYTES, Handshake, Role
from common.ports.peers import PeerConnection
from common.values.errors import PeerError

CONTROL_PURPOSE = "segue control 1"
MAX_FRAME_BYTES = 64 << 20
OUTBOX_BYTES = 64 << 20
HANDSHAKE_TIMEOUT_S = 5.0
MAX_UNPROVEN = 64
CLOSE_TIMEOUT_S = 2.0
_LENGTH = struct.Struct("<I")


class TcpPeerNetwork:
    """`rejected` counts, by reason, the connections that were never let in."""

    def __init__(
        self,
        cluster_key: bytes,
        host: str,
        port: int = 0,
        *,
        outbox_bytes: int = OUTBOX_BYTES,
        handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
    ) -> None:
        if len(cluster_key) < 16:
            raise ValueError("the cluster key has at least 16 bytes")
        self._key = cluster_key
        self._host = host
        self._port = port
        self._outbox_bytes = outbox_bytes
        self._handshake_timeout_s = handshake_timeout_s
        self._server: asyncio.Server | None = None
        self._connections: set[TcpPeerConnection] = set()
        self.rejected: Counter[str] = Counter()

    async def listen(self, on_connection: Callable[[PeerConnection], None]) -> tuple[str, int]:
        def accept() -> asyncio.Protocol:
            return self._connection("server", on_connection, self._count_rejected)

        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(accept, self._host, self._port)
        return self._host, self._server.sockets[0].getsockname()[1]

    async def dial(self, host: str, port: int, *, timeout_s: float) -> PeerConnection:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[PeerConnection] = loop.create_future()

        def fail(reason: str) -> None:
            if not ready.done():
                ready.set_exception(PeerError(f"no control connection to {host}:{port}: {reason}"))

        def succeed(connection: PeerConnection) -> None:
            if not ready.done():
                ready.set_result(connection)

        connection = self._connection("client", succeed, fail)
        try:
            async with asyncio.timeout(timeout_s):
                await loop.create_connection(lambda: connection, host, port)
                return await ready
        except OSError as error:
            raise PeerError(f"no control connection to {host}:{port}: {error!r}") from error
        finally:
            if not ready.done() or ready.cancelled() or ready.exception() is not None:
                connection.abort()

    async def close(self) -> None:
        """Stop listening and close all connections."""
        if self._server is not None:
            self._server.close()
            self._server = None
        async with asyncio.TaskGroup() as group:
            for connection in list(self._connections):
                group.create_task(connection.close())

    def _connection(
        self, role: Role, on_ready: "Callable[[PeerConnection], None]", on_rejected: Callable[[str], None]
    ) -> "TcpPeerConnection":
        unproven = sum(1 for connection in self._connections if not connection.proven)
        connection = TcpPeerConnection(
            handshake=Handshake(self._key, role, CONTROL_PURPOSE, secrets.token_bytes(NONCE_BYTES)),
            role=role,
            on_ready=on_ready,
            on_rejected=on_rejected,
            on_closed=self._connections.discard,
            outbox_bytes=self._outbox_bytes,
            handshake_timeout_s=0.0 if role == "server" and unproven >= MAX_UNPROVEN else self._handshake_timeout_s,
        )
        self._connections.add(connection)
        return connection

    def _count_rejected(self, reason: str) -> None:
        self.rejected[reason] += 1


class TcpPeerConnection(asyncio.Protocol):
    """One connection, from the first byte of the handshake on; the network hands it out once both sides are proven."""

    def __init__(
        self,
        *,
        handshake: Handshake,
        role: Role,
        on_ready: Callable[[PeerConnection], None],
        on_rejected: Callable[[str], None],
        on_closed: "Callable[[TcpPeerConnection], None]",
        outbox_bytes: int,
        handshake_timeout_s: float,
    ) -> None:
        self._handshake = handshake
        self._role: Role = role
        self._on_ready = on_ready
        self._on_rejected = on_rejected
        self._on_closed = on_closed
        self._outbox_bytes = outbox_bytes
        self._handshake_timeout_s = handshake_timeout_s
        self._deadline: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self._address = "unknown"
        self._received = bytearray()
        self._backlog: deque[bytes] = deque()
        self._on_message: Callable[[bytes], None] | None = None
        self._on_lost: Callable[[str], None] | None = None
        self._reason: str | None = None
        self._closing = False
        self._gone = asyncio.Event()

    @property
    def address(self) -> str:
        return self._address

    @property
    def proven(self) -> bool:
        return self._handshake.done

    def send(self, payload: bytes) -> None:
        transport = self._transport
        if transport is None or self._closing or self._reason is not None:
            return
        if len(payload) > MAX_FRAME_BYTES:
            raise ValueError(f"a message of {len(payload)} bytes; the limit is {MAX_FRAME_BYTES}")
        if transport.get_write_buffer_size() + len(payload) > self._outbox_bytes:
            self._break("the outbox is full: the peer does not read")
            return
        transport.write(_LENGTH.pack(len(payload)) + payload)

    def listen(self, on_message: Callable[[bytes], None], on_lost: Callable[[str], None]) -> None:
        if self._on_message is not None:
            raise RuntimeError("listen is called once")
        self._on_message = on_message
        self._on_lost = on_lost
        asyncio.get_running_loop().call_soon(self._deliver)

    async def close(self) -> None:
        """Send what is in the outbox, within a bound, and close. `on_lost` is not called."""
        self._closing = True
        self._backlog.clear()
        if self._transport is None:
            self._on_closed(self)
            return
        self._transport.close()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._gone.wait()
        except TimeoutError:
            self._transport.abort()
            await self._gone.wait()

    def abort(self) -> None:
        """At once, without a word."""
        self._closing = True
        if self._transport is not None:
            self._transport.abort()
        else:
            self._on_closed(self)

    # ------------------------------------------------------------------------------------------ asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        connected = cast("asyncio.Transport", transport)  # uvloop's is one in all but inheritance
        self._transport = connected
        if self._closing:
            connected.abort()
            return
        self._address = _format_address(connected.get_extra_info("peername"))
        sock = connected.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self._handshake_timeout_s, self._reject, "handshake time-out")
        if self._role == "client":
            connected.write(self._handshake.opening())

    def data_received(self, data: bytes) -> None:
        if self._reason is not None or self._closing:
            return
        self._received += data
        if not self._handshake.done and not self._shake_hands():
            return
        self._take_frames()
        self._deliver()

    def connection_lost(self, error: Exception | None) -> None:
        self._gone.set()
        self._on_closed(self)
        if self._deadline is not None:
            self._deadline.cancel()
        if not self._handshake.done:
            self._on_rejected(self._reason or "closed during the handshake")
            return
        if self._reason is None:
            self._reason = f"the connection broke: {error}" if error is not None else "the peer closed the connection"
        self._deliver()

    # ------------------------------------------------------------------------------------------ inside

    def _shake_hands(self) -> bool:
        """Feed the handshake; True once both sides are proven."""
        assert self._transport is not None
        while not self._handshake.done and len(self._received) >= self._handshake.expects:
            expected = self._handshake.expects
            piece = bytes(self._received[:expected])
            del self._received[:expected]
            try:
                answer = self._handshake.receive(piece)
            except PeerError as error:
                self._reject(str(error))
                return False
            self._transport.write(answer)
        if not self._handshake.done:
            return False
        if self._deadline is not None:
            self._deadline.cancel()
        self._on_ready(self)
        return True

    def _take_frames(self) -> None:
        """Move whole frames from the receive buffer to the backlog."""
        start = 0
        while len(self._received) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._received, start)
            if length > MAX_FRAME_BYTES:
                self._break(f"the peer announced a message of {length} bytes")
                break
            end = start + _LENGTH.size + length
            if len(self._received) < end:
                break
            self._backlog.append(bytes(memoryview(self._received)[start + _LENGTH.size : end]))
            start = end
        del self._received[:start]

    def _deliver(self) -> None:
        """Hand over what came, in order, then the loss, once; before `listen`, stop reading when much has come."""
        if self._on_message is None or self._on_lost is None:
            if self._transport is not None and sum(map(len, self._backlog)) > self._outbox_bytes:
                self._transport.pause_reading()
            return
        while self._backlog and not self._closing:
            self._on_message(self._backlog.popleft())
        if self._reason is not None and self._gone.is_set() and not self._closing:
            self._closing = True
            self._on_lost(self._reason)
        elif self._transport is not None and not self._transport.is_reading() and not self._transport.is_closing():
            self._transport.resume_reading()

    def _break(self, reason: str) -> None:
        """Give the connection up; `on_lost` follows from the event loop."""
        self._reason = reason
        if self._transport is not None:
            self._transport.abort()

    def _reject(self, reason: str) -> None:
        self._break(reason)


def _format_address(peername: object) -> str:
    if isinstance(peername, tuple) and len(peername) >= 2:
        host, port = peername[0], peername[1]
        return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    return "unknown"
