"""The client: one connection a request, as light as it can be, for it shares the machine with what it measures.

The only module that imports httptools (HTTP parsing).
"""

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field

import httptools

from tools.bench_load.answer_reader import AnswerReader
from tools.bench_load.bench_refused import BenchRefused
from tools.bench_load.endpoint import Endpoint

MAX_BODY_BYTES = 1 << 22
REQUEST_ID_HEADER = b"x-segue-request-id"


@dataclass(slots=True)
class Answer:
    """`status` 0: there was none. `body` is kept where it is not a stream."""

    status: int = 0
    request_id: str | None = None
    reader: AnswerReader = field(default_factory=AnswerReader)
    body: bytearray = field(default_factory=bytearray)
    broken: str | None = None
    ended: float = 0.0

    @property
    def failure(self) -> str | None:
        if self.broken is not None and not self.reader.is_done:
            return self.broken
        if self.status != 200:
            said = bytes(self.body[:300]).decode("utf-8", "replace")
            return f"status {self.status}: {said}" if self.status else "no answer"
        return self.reader.failure


class HttpClient:
    """`clock` stamps what arrives, when it arrives."""

    def __init__(self, endpoint: Endpoint, clock: Callable[[], float]) -> None:
        self._endpoint = endpoint
        self._clock = clock
        self._tls = ssl.create_default_context() if endpoint.is_tls else None

    async def stream(self, request: bytes) -> Answer:
        """Send it and read the stream to its end. Whatever goes wrong is in the answer."""
        return await self._exchange(request, is_stream=True)

    async def get(self, path: str) -> Answer:
        return await self._exchange(self._endpoint.get(path), is_stream=False)

    async def count_prompt_tokens(self, text: str) -> int:
        """Raises BenchRefused where the server does not say."""
        answer = await self.stream(self._endpoint.ask(text, 1))
        usage = answer.reader.usage
        if usage is None or not usage.prompt_tokens:
            why = answer.failure or "its streams carry no usage; use --api completions --prompt ids"
            raise BenchRefused(f"{self._endpoint.label} does not count prompt tokens: {why}")
        return usage.prompt_tokens

    async def _exchange(self, request: bytes, *, is_stream: bool) -> Answer:
        answer = Answer()
        loop = asyncio.get_running_loop()
        exchange = _Exchange(request, answer, self._clock, loop.create_future(), is_stream=is_stream)
        try:
            transport, _ = await loop.create_connection(lambda: exchange, self._endpoint.host, self._endpoint.port, ssl=self._tls)
        except OSError as error:
            answer.broken = f"no connection: {error}"
            answer.ended = self._clock()
            return answer
        try:
            await exchange.over
        finally:
            transport.close()
            answer.ended = answer.ended or self._clock()
        return answer


class _Exchange(asyncio.Protocol):
    """One request and its answer. Over at [DONE], at the end of the body, or when the connection breaks."""

    def __init__(
        self, request: bytes, answer: Answer, clock: Callable[[], float], over: "asyncio.Future[None]", *, is_stream: bool
    ) -> None:
        self.over = over
        self._request = request
        self._answer = answer
        self._clock = clock
        self._is_stream = is_stream
        self._parser = httptools.HttpResponseParser(self)
        self._now = 0.0

    # asyncio's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._now = self._clock()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._answer.broken = f"not HTTP: {error}"
            self._end()
        if self._answer.reader.is_done:
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.over.done():
            self._now = self._clock()
            if exc is not None:
                self._answer.broken = f"the connection broke: {exc}"
            self._end()

    # httptools' calls

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == REQUEST_ID_HEADER:
            self._answer.request_id = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._is_stream and self._answer.status == 200:
            self._answer.reader.feed(body, self._now)
        elif len(self._answer.body) < MAX_BODY_BYTES:
            self._answer.body += body

    def on_message_complete(self) -> None:
        self._end()

    def _end(self) -> None:
        if not self.over.done():
            self._answer.ended = self._now
            self.over.set_result(None)
