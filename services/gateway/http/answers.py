"""Writing the answer of an opened request: as a stream of events, or whole."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from services.gateway.client_requests import Opened
from services.gateway.http.asgi import AnswerCut, Send, send_json
from services.gateway.http.event_stream import EventStream
from services.gateway.http.http_errors import Stopping, answerable
from services.gateway.openai.event_id import parse_event_id
from services.gateway.openai.plan import RequestPlan
from services.gateway.openai.whole_answer import WholeAnswer

_log = logging.getLogger(__name__)

Opening = AbstractAsyncContextManager[Opened]


async def write_whole(opening: Opening, send: Send, end_watch: Callable[[], object]) -> None:
    async with opening as (plan, generation):
        answer = WholeAnswer(plan)
        while (events := await generation.next_events()) is not None:
            for event in events:
                answer.add(event)
        content = answer.encode(generation.usage, generation.prompt_positions)
    end_watch()
    await send_json(send, content, headers=request_id_headers(plan))


async def write_stream(
    opening: Opening, send: Send, end_watch: Callable[[], object], *, keepalive_s: float, last_event_id: str = ""
) -> None:
    """Events after `last_event_id`, the end included. Failures before the answer has begun are raised."""
    stream = EventStream(send, keepalive_s=keepalive_s, before_end=end_watch)
    try:
        async with opening as (plan, generation):
            stream.begin(plan, parse_event_id(last_event_id, plan.choices), request_id_headers(plan))
            async with stream.kept_alive():
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


def request_id_headers(plan: RequestPlan) -> list[tuple[bytes, bytes]]:
    """The second one is the name that `/v1/streams/` takes."""
    return [(b"x-request-id", plan.id.encode()), (b"x-segue-request-id", plan.id.encode())]
