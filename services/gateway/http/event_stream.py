"""One answer as server-sent events, over raw ASGI.

The 200 goes out with the first token, or after `keepalive_s` of silence, whichever is first; from then on a comment follows
every `keepalive_s` of further silence. A stream that was begun never ends silently: its last event is `[DONE]`, with an error
before it where the request failed.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress

from common.runtime.one_error import one_error
from common.values.errors import SegueError
from services.gateway.http.asgi import Headers, Send
from services.gateway.openai.chunks import DONE, PING, ChunkEncoder, error_event
from services.gateway.openai.error_object import error_object
from services.gateway.openai.plan import RequestPlan
from services.gateway.text_generation import TextGeneration

LAST_WORDS_S = 1.0


class EventStream:
    """`begin` once the request is there, then `pump` within `kept_alive`. `before_end` is called just before the last part is
    sent."""

    def __init__(self, send: Send, *, keepalive_s: float, before_end: Callable[[], object]) -> None:
        self._send = send
        self._keepalive_s = keepalive_s
        self._before_end = before_end
        self._encoder: ChunkEncoder
        self._headers: Headers = ()
        self._shows_usage = False
        self._writing = asyncio.Lock()
        self._written = time.monotonic()
        self.opened = False
        self.ended = False

    def begin(self, plan: RequestPlan, position: Sequence[int], headers: Headers) -> None:
        """`position` is what the client has consumed of each choice."""
        self._encoder = ChunkEncoder(plan, position)
        self._shows_usage = plan.include_usage
        self._headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), *headers]

    @asynccontextmanager
    async def kept_alive(self) -> AsyncIterator[None]:
        """Within the block, silence is filled. Enter it when the request has been admitted."""
        self._written = time.monotonic()
        with one_error():
            async with asyncio.TaskGroup() as group:
                pinger = group.create_task(self._fill_silence())
                try:
                    yield
                finally:
                    pinger.cancel()

    async def pump(self, generation: TextGeneration) -> None:
        """All events of a request, then usage and the end. All that is ready goes out in one write."""
        encode = self._encoder.event
        while (events := await generation.next_events()) is not None:
            await self._write(b"".join([encode(event) for event in events]))
        last = self._encoder.usage(generation.usage) if self._shows_usage else b""
        await self._write(last + DONE, end=True)

    async def fail(self, error: SegueError) -> None:
        """The last words of a stream that was begun; bounded, for the reader may be gone or stuck."""
        if self.opened and not self.ended:
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORDS_S):
                    await self._write(error_event(error_object(error)) + DONE, end=True)

    async def _write(self, data: bytes, *, end: bool = False) -> None:
        async with self._writing:
            await self._write_now(data, end=end)

    async def _write_now(self, data: bytes, *, end: bool = False) -> None:
        """Only with the lock: start and body must not overtake each other."""
        if not self.opened:
            self.opened = True
            await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})
        if end:
            self._before_end()
        if data or end:
            await self._send({"type": "http.response.body", "body": data, "more_body": not end})
        self.ended = end
        self._written = time.monotonic()

    async def _fill_silence(self) -> None:
        """A slow reader is not silence: while a write waits for it, this waits for the lock."""
        while not self.ended:
            await asyncio.sleep(max(0.0, self._written + self._keepalive_s - time.monotonic()))
            async with self._writing:
                if not self.ended and self._written + self._keepalive_s <= time.monotonic():
                    await self._write_now(PING)
