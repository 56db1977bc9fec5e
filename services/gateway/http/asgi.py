"""The ASGI interface, typed as far as we use it, and the few things that every route needs of it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from common.runtime.one_error import one_error
from common.values.errors import InvalidRequest, PayloadTooLarge, SegueError, Unavailable
from services.gateway.openai.error_object import error_object, error_status

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]


class ClientGone(Exception):
    """The client closed its connection; nobody reads an answer."""


class AnswerCut(ClientGone):
    """An answer was ended early, with its last words said: nothing may be sent any more."""


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first value of a header; `name` in lower case."""
    return next((value for key, value in scope["headers"] if key == name), None)


async def read_body(scope: Scope, receive: Receive, *, limit_bytes: int, timeout_s: float) -> bytes:
    """The whole body. Raises PayloadTooLarge, InvalidRequest where it comes too slowly, ClientGone."""
    declared = header(scope, b"content-length")
    too_large = PayloadTooLarge(f"the body may have at most {limit_bytes} bytes")
    if declared is not None and declared.isdigit() and int(declared) > limit_bytes:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                size += len(part)
                if size > limit_bytes:
                    raise too_large
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError as error:
        raise InvalidRequest(f"the body did not arrive within {timeout_s:g} s") from error


@asynccontextmanager
async def cancelled_by_disconnect(receive: Receive) -> AsyncIterator[Callable[[], object]]:
    """Cancel the block when the client leaves: ClientGone is raised then. To be used after the body has been read.

    Yields what ends the watch, to be called before the last part of an answer: ASGI tells an answered request's end in the
    same words as a client's leaving.
    """
    with one_error(first=ClientGone):
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(_until_disconnect(receive))
            yield watcher.cancel
            watcher.cancel()


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientGone


async def send_json(send: Send, content: bytes, *, status: int = 200, headers: Headers = ()) -> None:
    await send_whole(send, content, content_type=b"application/json", status=status, headers=headers)


async def send_whole(send: Send, content: bytes, *, content_type: bytes, status: int = 200, headers: Headers = ()) -> None:
    fixed = [(b"content-type", content_type), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    await send({"type": "http.response.body", "body": content})


async def send_error(send: Send, error: SegueError, *, headers: Headers = ()) -> int:
    """OpenAI's error object, with Retry-After where trying again helps. Returns the status."""
    status = error_status(error)
    extra = list(headers)
    if isinstance(error, Unavailable):
        extra.append((b"retry-after", str(max(1, round(error.retry_after_s))).encode()))
    if status == 401:
        extra.append((b"www-authenticate", b"Bearer"))
    await send_json(send, msgspec.json.encode(error_object(error)), status=status, headers=extra)
    return status
