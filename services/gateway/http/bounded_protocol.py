"""uvicorn's two protocols with the bounds that it lacks: how slowly a request's head may come, how large it may be, how long
a client may take nothing of its answer, and how many connections there may be."""

import asyncio
from dataclasses import dataclass
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from common.values.errors import InvalidRequest, RequestError
from services.gateway.http.http_settings import HttpSettings
from services.gateway.openai.error_object import error_object

MAX_HEAD_BYTES = 64 * 1024
DISCARD_S = 5.0


class HeadTooLarge(RequestError):
    status = 431
    code = "request_header_fields_too_large"


@dataclass(slots=True)
class _StalledWrite:
    """Aborts a connection whose write buffer stays full: its reader has taken nothing for `after_s`."""

    after_s: float
    timer: asyncio.TimerHandle | None = None

    def begin(self, transport: asyncio.Transport) -> None:
        self.end()
        self.timer = asyncio.get_running_loop().call_later(self.after_s, transport.abort)

    def end(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class BoundedHttpProtocol(HttpToolsProtocol):
    """The head's timer runs from the first byte (or the connection) to the end of the headers."""

    def __init__(self, *, settings: HttpSettings, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._settings = settings
        self._stalled = _StalledWrite(settings.slow_reader_timeout_s)
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._discard_timer: asyncio.TimerHandle | None = None
        self._upgraded = False
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._settings.max_connections:
            transport.abort()
            return
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_arrived()
        self._end_discard()
        self._stalled.end()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if self.transport.is_closing() or self._upgraded or self._discard_timer is not None:
            return
        if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_head()
        if self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(HeadTooLarge(f"the request's head may have at most {MAX_HEAD_BYTES} bytes"))

    def on_headers_complete(self) -> None:
        self._head_arrived()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """A client that still sends its body would miss an answer if we closed at once: its bytes are thrown away a while."""
        super().on_response_complete()
        if self.cycle.more_body and not self.transport.is_closing():
            self._discard_timer = self.loop.call_later(DISCARD_S, self.transport.abort)

    def on_message_complete(self) -> None:
        self._end_discard()
        super().on_message_complete()

    def handle_websocket_upgrade(self) -> None:
        self._upgraded = True
        super().handle_websocket_upgrade()

    def send_400_response(self, msg: str) -> None:
        self._refuse(InvalidRequest(msg))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled.begin(self.transport)

    def resume_writing(self) -> None:
        self._stalled.end()
        super().resume_writing()

    def _expect_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(self._settings.header_timeout_s, self.transport.abort)

    def _head_arrived(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_discard(self) -> None:
        if self._discard_timer is not None:
            self._discard_timer.cancel()
            self._discard_timer = None

    def _refuse(self, error: RequestError) -> None:
        """Answer what never became a request. What still comes is thrown away a while: a close now would reset the
        connection, and the answer with it."""
        body = msgspec.json.encode(error_object(error))
        head = f"HTTP/1.1 {error.status} Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.write_eof()
        self._head_arrived()
        self._refused = True
        self._discard_timer = self.loop.call_later(DISCARD_S, self.transport.abort)


class BoundedWebSocketProtocol(WebSocketsSansIOProtocol):
    """A shutdown leaves the connection to the application, which closes it once its requests have ended."""

    def __init__(self, *, settings: HttpSettings, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._stalled = _StalledWrite(settings.slow_reader_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stalled.end()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled.begin(self.transport)

    def resume_writing(self) -> None:
        self._stalled.end()
        super().resume_writing()

    def shutdown(self) -> None:
        if not self.handshake_complete:
            super().shutdown()
