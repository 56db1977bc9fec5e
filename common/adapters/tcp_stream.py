"""A non-blocking TCP socket on the event loop that reads and writes buffers in place, without asyncio's own buffers between.

Bulk bytes go through the loop in slices, so that no single one holds up the other work on it for long.
"""

import asyncio
import contextlib
import secrets
import socket

from common.adapters.tcp_handshake import NONCE_BYTES, Handshake, Role
from common.values.errors import PeerError

SLICE_BYTES = 256 << 10
SOCKET_BUFFER_BYTES = 4 << 20


class TcpStream:
    """Whole-buffer reads and writes. An end of the peer, whenever it comes, is a PeerError."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket = sock

    @staticmethod
    async def dial(host: str, port: int) -> "TcpStream":
        """Raises OSError."""
        loop = asyncio.get_running_loop()
        infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = infos[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
            await loop.sock_connect(sock, address)
            return TcpStream(sock)
        except BaseException:
            sock.close()
            raise

    async def handshake(self, secret: bytes, role: Role, purpose: str) -> None:
        """Raises PeerError where the peer does not know the secret."""
        exchange = Handshake(secret, role, purpose, secrets.token_bytes(NONCE_BYTES))
        if role == "client":
            await self.send(exchange.opening())
        while not exchange.done:
            answer = exchange.receive(bytes(await self.read(exchange.expects)))
            if answer:
                await self.send(answer)

    async def read(self, size: int) -> bytearray:
        """Exactly `size` bytes; the caller has bounded `size`."""
        data = bytearray(size)
        await self.read_into(memoryview(data))
        return data

    async def read_into(self, target: memoryview) -> None:
        loop = asyncio.get_running_loop()
        filled = 0
        while filled < len(target):
            try:
                count = await loop.sock_recv_into(self._socket, target[filled : filled + SLICE_BYTES])
            except OSError as error:
                raise PeerError(f"the data connection broke: {error}") from error
            if count == 0:
                raise PeerError("the peer closed the data connection")
            filled += count

    async def send(self, data: bytes | memoryview) -> None:
        loop = asyncio.get_running_loop()
        view = memoryview(data)
        for start in range(0, len(view), SLICE_BYTES):
            try:
                await loop.sock_sendall(self._socket, view[start : start + SLICE_BYTES])
            except OSError as error:
                raise PeerError(f"the data connection broke: {error}") from error

    def end(self) -> None:
        """Wake whoever reads or writes, with a PeerError; they then close. A socket must not be closed under a waiting task."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.end()
        self._socket.close()
