"""Clients that misbehave: they leave in the middle, in order or not, or read a byte a while.

They speak over bare sockets, since client libraries are too polite for it.
"""

import asyncio
import json
import secrets
import socket
import struct
from typing import Any, Self
from urllib.parse import urlsplit

from tests.faults.fault_client import MODEL

RECEIVE_BUFFER_BYTES = 4096
BYTE_EACH_S = 0.05


class LeavingClient:
    """One request under way. `await LeavingClient.ask(url, …)` has sent it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def ask(cls, url: str, *, tokens: int, **changes: Any) -> Self:
        """A plain stream, which ends when its client leaves."""
        prompt = f"{secrets.token_hex(4)} " * 12
        body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True, **changes}
        payload = json.dumps(body).encode()
        parts = urlsplit(url)
        ours = socket.socket()
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        await asyncio.get_running_loop().sock_connect(ours, (parts.hostname, parts.port))
        reader, writer = await asyncio.open_connection(sock=ours, limit=RECEIVE_BUFFER_BYTES)
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(payload)}\r\n\r\n".encode() + payload)
        return cls(reader, writer)

    async def read_events(self, number: int) -> None:
        """Until so many events have come."""
        async with asyncio.timeout(30):
            while number:
                number -= (await self._reader.readline()).startswith(b"data:")

    async def read_slowly(self) -> None:
        """A byte a while, until cancelled or cut off."""
        while await self._reader.read(1):
            await asyncio.sleep(BYTE_EACH_S)

    def leave(self, *, abruptly: bool) -> None:
        """Close the connection, or tear it down (RST)."""
        if abruptly:
            linger = struct.pack("ii", 1, 0)
            self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._writer.transport.abort()
