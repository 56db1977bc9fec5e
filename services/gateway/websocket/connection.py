"""One websocket connection: reads frames, runs each request in a task of its own, lets go of all of them when the client leaves.

Nothing is queued here: a request writes its frames itself and waits while the client's socket takes no more, so a slow
reader holds up only its own requests, and its tokens wait in the generation, where they are bounded.
"""

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import replace
from urllib.parse import urlsplit

from common.runtime.one_error import one_error
from common.values.errors import InvalidRequest, NotAuthorised, Overloaded, SegueError
from services.gateway.client_requests import ClientRequests
from services.gateway.gateway_metrics import GatewayMetrics
from services.gateway.http.answers import Opening
from services.gateway.http.api_keys import ApiKeys
from services.gateway.http.asgi import ClientGone, Receive, Scope, Send, header
from services.gateway.http.http_errors import Stopping, answerable
from services.gateway.http.http_settings import HttpSettings
from services.gateway.http.request_slots import RequestSlots
from services.gateway.http.speed_wishes import SpeedWishes
from services.gateway.openai.body import parse_chat_body, parse_completion_body
from services.gateway.openai.event_id import parse_event_id
from services.gateway.openai.plan import Asker, RequestPlan
from services.gateway.openai.planner import Planner
from services.gateway.websocket.frames import (
    READY_FRAME,
    AuthFrame,
    CancelFrame,
    FrameEncoder,
    GenerateFrame,
    ResumeFrame,
    accepted_frame,
    error_frame,
    frame_id,
    never_begun,
    parse_frame,
)

_log = logging.getLogger(__name__)

POLICY_VIOLATION = 1008
GOING_AWAY = 1001
LAST_WORDS_S = 1.0


class WebSocketConnection:
    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        requests: ClientRequests,
        planner: Planner,
        slots: RequestSlots,
        metrics: GatewayMetrics,
        keys: ApiKeys,
        wishes: SpeedWishes,
        settings: HttpSettings,
        stopping: asyncio.Event,
    ) -> None:
        self._scope = scope
        self._receive = receive
        self._raw_send = send
        self._requests = requests
        self._planner = planner
        self._slots = slots
        self._metrics = metrics
        self._keys = keys
        self._wishes = wishes
        self._settings = settings
        self._stopping = stopping
        self._running: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._cancelled: set[str] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._authorised = not keys.required
        self._tenant = ""

    async def run(self) -> None:
        try:
            if await self._accepted():
                self._metrics.websockets.add(1)
                try:
                    await self._serve()
                finally:
                    self._metrics.websockets.add(-1)
        except ClientGone:
            return
        except asyncio.CancelledError:
            if not self._stopping.is_set():
                raise
            await self._last_words({"type": "websocket.close", "code": GOING_AWAY, "reason": "the gateway stops"})

    async def _accepted(self) -> bool:
        """A wrong key in the handshake is refused there; none at all leaves it to the first frame."""
        await self._receive()
        authorization = header(self._scope, b"authorization")
        try:
            if authorization is not None and self._keys.required:
                self._tenant = self._keys.check(authorization)
                self._authorised = True
        except NotAuthorised:
            await self._send({"type": "websocket.close", "code": POLICY_VIOLATION})
            return False
        if self._stopping.is_set() or not (self._keys.required or self._is_same_origin()):
            await self._send({"type": "websocket.close", "code": POLICY_VIOLATION})
            return False
        await self._send({"type": "websocket.accept"})
        return True

    def _is_same_origin(self) -> bool:
        """Browsers open websockets across sites without asking: without keys, a foreign page must not get in."""
        origin, host = header(self._scope, b"origin"), header(self._scope, b"host")
        return origin is None or urlsplit(origin).netloc == host

    async def _serve(self) -> None:
        with one_error(first=ClientGone):
            async with asyncio.TaskGroup() as group:
                closer = group.create_task(self._close_when_drained())
                try:
                    await self._read_frames(group)
                finally:
                    closer.cancel()
                    for task in self._tasks:
                        task.cancel()

    async def _read_frames(self, group: asyncio.TaskGroup) -> None:
        while True:
            try:
                async with asyncio.timeout(None if self._authorised else self._settings.header_timeout_s):
                    message = await self._receive()
            except TimeoutError:
                await self._close(POLICY_VIOLATION, "no key came in time")
                return
            if message["type"] == "websocket.disconnect":
                return
            text = message.get("text")
            if text is None:
                await self._send_text(error_frame(None, InvalidRequest("frames are JSON text, not binary")))
            elif not await self._handled(text, group):
                return

    async def _handled(self, text: str, group: asyncio.TaskGroup) -> bool:
        """False where the connection is over."""
        try:
            frame = parse_frame(text)
        except InvalidRequest as error:
            await self._send_text(error_frame(frame_id(text), error))
            return True
        match frame:
            case AuthFrame(api_key=key):
                self._authenticate(key)
                if self._authorised:
                    await self._send_text(READY_FRAME)
            case GenerateFrame() | ResumeFrame() if self._authorised:
                await self._begin(frame, text, group)
            case CancelFrame(id=client_id) if self._authorised:
                await self._cancel(client_id)
            case _:
                pass
        if not self._authorised:
            await self._send_text(error_frame(frame_id(text), NotAuthorised("this API key is not known here, or none was sent")))
            await self._close(POLICY_VIOLATION, "not authorised")
        return self._authorised

    def _authenticate(self, key: str) -> None:
        if not self._authorised and self._keys.accepts(key.encode()):
            self._authorised = True
            self._tenant = self._keys.tenant(key.encode())

    async def _begin(self, frame: GenerateFrame | ResumeFrame, text: str, group: asyncio.TaskGroup) -> None:
        refusal: SegueError | None = None
        if frame.id in self._running:
            refusal = InvalidRequest(f"the id {frame.id} is in use on this connection", param="id")
        elif len(self._running) >= self._settings.websocket_max_requests:
            refusal = Overloaded(f"a connection runs at most {self._settings.websocket_max_requests} requests at once")
        elif self._stopping.is_set():
            refusal = Stopping("the gateway stops")
        if refusal is not None:
            await self._send_text(error_frame(frame.id, refusal))
            return
        self._idle.clear()
        task = self._running[frame.id] = group.create_task(self._run_request(frame, text))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        await asyncio.sleep(0)  # a task that is cancelled before its first step would never tell its end

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not self._tasks:
            self._idle.set()

    async def _cancel(self, client_id: str) -> None:
        """Nothing happens where the request has ended already: its `done` is on its way."""
        task = self._running.get(client_id)
        if task is not None and client_id not in self._cancelled:
            self._cancelled.add(client_id)
            task.cancel()

    async def _run_request(self, frame: GenerateFrame | ResumeFrame, text: str) -> None:
        last = ""
        try:
            with self._slots.one():
                if isinstance(frame, ResumeFrame):
                    opening = self._requests.resumed(frame.request_id, self._tenant)
                    last = await self._stream(frame.id, opening, frame.last_event_id)
                else:
                    arrived = time.monotonic()
                    wanted = self._wishes.of(self._scope, self._tenant, frame.metadata)
                    asker = Asker(tenant=self._tenant, lingers=True, wanted=wanted)
                    plan = replace(await self._plan(frame, text), asker=asker)
                    last = await self._stream(frame.id, self._requests.opened(plan, arrived=arrived), "")
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if frame.id not in self._cancelled or task is None:
                if self._stopping.is_set():
                    text = error_frame(frame.id, Stopping("the gateway stops"))
                    await self._last_words({"type": "websocket.send", "text": text})
                raise
            task.uncancel()
            last = never_begun(frame.id)
        except ClientGone:
            raise
        except Exception as error:
            last = error_frame(frame.id, answerable(error, _log))
        finally:
            self._running.pop(frame.id)  # before the client can read the end: the id is free again then
            self._cancelled.discard(frame.id)
        await self._send_text(last)

    async def _plan(self, frame: GenerateFrame, text: str) -> RequestPlan:
        if frame.is_chat == frame.is_completion:
            raise InvalidRequest("generate needs either messages (chat) or prompt (completion)", param="messages")
        if frame.is_chat:
            return await self._planner.chat(parse_chat_body(text))
        return await self._planner.completion(parse_completion_body(text))

    async def _stream(self, client_id: str, opening: Opening, last_event_id: str) -> str:
        """Write a request's tokens; returns the frame that ends it. Only its own `cancel` ends it: one whose connection has
        gone lives on for a while."""
        async with opening as (plan, generation):
            encoder = FrameEncoder(client_id, plan, parse_event_id(last_event_id, plan.choices))
            try:
                await self._send_text(accepted_frame(client_id, plan))
                while (events := await generation.next_events()) is not None:
                    for event in events:
                        if frame := encoder.token(event):
                            await self._send_text(frame)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if client_id not in self._cancelled or task is None:
                    raise
                task.uncancel()
                generation.cancel()
            return encoder.done(generation.usage)

    async def _close_when_drained(self) -> None:
        await self._stopping.wait()
        await self._idle.wait()
        await self._close(GOING_AWAY, "the gateway stops")

    async def _close(self, code: int, reason: str) -> None:
        await self._send({"type": "websocket.close", "code": code, "reason": reason})

    async def _last_words(self, message: dict[str, object]) -> None:
        """The drain's deadline has passed; bounded, for the client may be gone or stuck."""
        with suppress(ClientGone, TimeoutError, RuntimeError):
            async with asyncio.timeout(LAST_WORDS_S):
                await self._send(message)

    async def _send_text(self, text: str) -> None:
        await self._send({"type": "websocket.send", "text": text})

    async def _send(self, message: dict[str, object]) -> None:
        try:
            await self._raw_send(message)
        except OSError as error:
            raise ClientGone from error
