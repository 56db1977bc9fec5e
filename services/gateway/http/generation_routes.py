"""The hot routes: a body in, a stream or a whole answer out; and a stream again, for a client that comes back to it."""

import time
from collections.abc import Callable
from dataclasses import replace

from services.gateway.client_requests import ClientRequests
from services.gateway.http.answers import write_stream, write_whole
from services.gateway.http.api_keys import ApiKeys
from services.gateway.http.asgi import Receive, Scope, Send, cancelled_by_disconnect, header, read_body
from services.gateway.http.come_back import asker_of, last_event_id
from services.gateway.http.http_errors import UnsupportedMediaType
from services.gateway.http.http_settings import HttpSettings
from services.gateway.http.request_slots import RequestSlots
from services.gateway.http.speed_wishes import SpeedWishes
from services.gateway.openai.body import ChatBody, CompletionBody, parse_chat_body, parse_completion_body
from services.gateway.openai.plan import RequestPlan
from services.gateway.openai.planner import Planner

STREAM_PREFIX = "/v1/streams/"
Parse = Callable[[bytes], ChatBody | CompletionBody]


class GenerationRoutes:
    """Each returns the status that was answered. Failures before the answer has begun are raised."""

    def __init__(
        self,
        requests: ClientRequests,
        planner: Planner,
        slots: RequestSlots,
        keys: ApiKeys,
        wishes: SpeedWishes,
        settings: HttpSettings,
    ) -> None:
        self._requests = requests
        self._planner = planner
        self._slots = slots
        self._keys = keys
        self._wishes = wishes
        self._settings = settings

    async def chat(self, scope: Scope, receive: Receive, send: Send) -> int:
        return await self._generate(scope, receive, send, parse_chat_body)

    async def completion(self, scope: Scope, receive: Receive, send: Send) -> int:
        return await self._generate(scope, receive, send, parse_completion_body)

    async def resume(self, scope: Scope, receive: Receive, send: Send) -> int:
        """`GET /v1/streams/{id}`: the events after the last one that the client has."""
        stream_id = scope["path"].removeprefix(STREAM_PREFIX).rstrip("/")
        tenant = self._keys.check(header(scope, b"authorization"))
        position = last_event_id(scope)
        with self._slots.one():
            async with cancelled_by_disconnect(receive) as end_watch:
                opening = self._requests.resumed(stream_id, tenant)
                keepalive_s = self._settings.sse_keepalive_s
                await write_stream(opening, send, end_watch, keepalive_s=keepalive_s, last_event_id=position)
        return 200

    async def _generate(self, scope: Scope, receive: Receive, send: Send, parse: Parse) -> int:
        _require_json(scope)
        tenant = self._keys.check(header(scope, b"authorization"))
        with self._slots.one():
            settings = self._settings
            raw = await read_body(scope, receive, limit_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)
            arrived = time.monotonic()
            async with cancelled_by_disconnect(receive) as end_watch:
                body = parse(raw)
                del raw
                wanted = self._wishes.of(scope, tenant, body.metadata)
                plan = replace(await self._plan(body), asker=asker_of(scope, tenant, body, wanted))
                del body
                opening = self._requests.opened(plan, arrived=arrived)
                if plan.stream:
                    await write_stream(opening, send, end_watch, keepalive_s=settings.sse_keepalive_s)
                else:
                    await write_whole(opening, send, end_watch)
        return 200

    async def _plan(self, body: ChatBody | CompletionBody) -> RequestPlan:
        return await (self._planner.chat(body) if isinstance(body, ChatBody) else self._planner.completion(body))


def _require_json(scope: Scope) -> None:
    """Other types are refused also because a browser sends them across sites without asking."""
    content_type = (header(scope, b"content-type") or b"").partition(b";")[0].strip().lower()
    if content_type != b"application/json":
        raise UnsupportedMediaType("the body must be JSON: send `Content-Type: application/json`")
