"""The two hot routes: a body in, a stream or a whole answer out."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from common.ports.generation import MeshClient
from services.gateway.gateway_metrics import GatewayMetrics
from services.gateway.http.asgi import AnswerCut, Receive, Scope, Send, cancelled_by_disconnect, header, read_body, send_json
from services.gateway.http.event_stream import EventStream
from services.gateway.http.http_errors import Stopping, UnsupportedMediaType, answerable
from services.gateway.http.http_settings import HttpSettings
from services.gateway.http.request_slots import RequestSlots
from services.gateway.openai.body import parse_chat_body, parse_completion_body
from services.gateway.openai.plan import RequestPlan
from services.gateway.openai.planner import Planner
from services.gateway.openai.whole_answer import WholeAnswer
from services.gateway.text_generation import text_generation

_log = logging.getLogger(__name__)

Parse = Callable[[bytes], Awaitable[RequestPlan]]


class GenerationRoutes:
    """Each returns the status that was answered. Failures before the answer has begun are raised."""

    def __init__(
        self, mesh: MeshClient, planner: Planner, slots: RequestSlots, metrics: GatewayMetrics, settings: HttpSettings
    ) -> None:
        self._mesh = mesh
        self._planner = planner
        self._slots = slots
        self._metrics = metrics
        self._settings = settings

    async def chat(self, scope: Scope, receive: Receive, send: Send) -> int:
        return await self._generate(scope, receive, send, lambda raw: self._planner.chat(parse_chat_body(raw)))

    async def completion(self, scope: Scope, receive: Receive, send: Send) -> int:
        return await self._generate(scope, receive, send, lambda raw: self._planner.completion(parse_completion_body(raw)))

    async def _generate(self, scope: Scope, receive: Receive, send: Send, parse: Parse) -> int:
        _require_json(scope)
        with self._slots.one():
            settings = self._settings
            raw = await read_body(scope, receive, limit_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)
            arrived = time.monotonic()
            async with cancelled_by_disconnect(receive) as end_watch:
                plan = await parse(raw)
                del raw
                if plan.stream:
                    await self._stream(plan, send, arrived, end_watch)
                else:
                    await self._whole(plan, send, arrived, end_watch)
        return 200

    async def _whole(self, plan: RequestPlan, send: Send, arrived: float, end_watch: Callable[[], object]) -> None:
        answer = WholeAnswer(plan)
        async with text_generation(self._mesh, plan, self._metrics, arrived=arrived) as generation:
            while (events := await generation.next_events()) is not None:
                for event in events:
                    answer.add(event)
            content = answer.encode(generation.usage, generation.prompt_positions)
        end_watch()
        await send_json(send, content, headers=_request_id(plan))

    async def _stream(self, plan: RequestPlan, send: Send, arrived: float, end_watch: Callable[[], object]) -> None:
        stream = EventStream(send, plan, keepalive_s=self._settings.sse_keepalive_s, headers=_request_id(plan), before_end=end_watch)
        try:
            async with text_generation(self._mesh, plan, self._metrics, arrived=arrived) as generation, stream.kept_alive():
                await stream.pump(generation)
        except asyncio.CancelledError:
            if not stream.opened:
                raise
            await stream.fail(Stopping("the gateway stops"))
            raise AnswerCut from None
        except Exception as error:
            if not stream.opened:
                raise
            await stream.fail(answerable(error, _log))


def _require_json(scope: Scope) -> None:
    """Other types are refused also because a browser sends them across sites without asking."""
    content_type = (header(scope, b"content-type") or b"").partition(b";")[0].strip().lower()
    if content_type != b"application/json":
        raise UnsupportedMediaType("the body must be JSON: send `Content-Type: application/json`")


def _request_id(plan: RequestPlan) -> list[tuple[bytes, bytes]]:
    return [(b"x-request-id", plan.id.encode())]
