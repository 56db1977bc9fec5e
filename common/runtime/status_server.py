"""A worker's own little HTTP port: /metrics, /health (whether it should go on living), /readyz.

Answers one request a connection; nothing else is served.

Bound to the worker's host: put it on an address that only the operators reach. What it shows names no request.
"""

import asyncio
from collections.abc import Callable

from common.runtime.metrics import CONTENT_TYPE, Metrics
from common.values.errors import SettingsError

READ_TIMEOUT_S = 5.0
MAX_REQUEST_BYTES = 8192


class StatusServer:
    """An async context manager; `port` 0 takes a free one, None serves nothing."""

    def __init__(
        self, host: str, port: int | None, metrics: Metrics, *, ready: Callable[[], bool], alive: Callable[[], bool] = lambda: True
    ) -> None:
        self._host = host
        self._port = port
        self._metrics = metrics
        self._ready = ready
        self._alive = alive
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> "StatusServer":
        if self._port is not None:
            try:
                self._server = await asyncio.start_server(self._serve, self._host, self._port, limit=MAX_REQUEST_BYTES)
            except OSError as error:
                raise SettingsError(f"--status-port {self._port} on {self._host} cannot be taken: {error}") from error
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    @property
    def url(self) -> str | None:
        return None if self._server is None else f"http://{self._host}:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._answer(head))
                await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            return
        finally:
            writer.close()

    def _answer(self, head: bytes) -> bytes:
        words = head.split(b"\r\n", 1)[0].split(b" ")
        path = words[1] if len(words) == 3 and words[0] in (b"GET", b"HEAD") else b""
        kind = CONTENT_TYPE
        match path:
            case b"/metrics":
                status, body = "200 OK", self._metrics.exposition()
            case b"/health":
                status, body = ("200 OK", "ok\n") if self._alive() else ("503 Service Unavailable", "a step hangs\n")
            case b"/readyz":
                status, body = ("200 OK", "ready\n") if self._ready() else ("503 Service Unavailable", "not ready\n")
            case _:
                status, body = "404 Not Found", "there is /metrics, /health and /readyz\n"
        encoded = body.encode() if isinstance(body, str) else body
        head_line = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(encoded)}\r\nConnection: close\r\n\r\n"
        return head_line.encode() + (b"" if words[0] == b"HEAD" else encoded)
