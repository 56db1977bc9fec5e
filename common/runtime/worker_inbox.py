"""What gateways ask of a worker over the broker: dispatches, cancels, replays; and the answers."""

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from common.mesh.worker import WorkerCore
from common.ports.broker import Message
from common.protocol.messages import (
    Cancel,
    Dispatch,
    DispatchReply,
    ReplayEntry,
    ReplayReply,
    RoleChange,
    TellCache,
    decode_inbox,
    decode_replay_request,
    encode,
    unpack_ids,
)
from common.protocol.request_record import PROMPT_FIELD
from common.protocol.subjects import Names
from common.runtime.failpoints import Failpoints
from common.runtime.message_refusals import MessageRefusals
from common.runtime.worker_parts import WorkerIdentity, WorkerWorld
from common.values.errors import BrokerUnavailable, InvariantBroken, PayloadTooLarge, PeerError, SegueError, StoreUnavailable
from common.values.ids import RequestId
from common.values.tokens import NewTokens

logger = logging.getLogger(__name__)


class WorkerInbox:
    """Brings messages to the core and its answers back; `after_event` performs what the core decided. A broken invariant is
    told to `on_broken`: the broker's client would only log it."""

    def __init__(
        self,
        identity: WorkerIdentity,
        world: WorkerWorld,
        core: WorkerCore,
        names: Names,
        tasks: asyncio.TaskGroup,
        after_event: Callable[[], None],
        on_broken: Callable[[SegueError], None],
        on_role: Callable[[RoleChange], None],
        failpoints: Failpoints,
        refusals: MessageRefusals,
    ) -> None:
        self._identity = identity
        self._world = world
        self._core = core
        self._names = names
        self._tasks = tasks
        self._after_event = after_event
        self._on_broken = on_broken
        self._on_role = on_role
        self._failpoints = failpoints
        self._refusals = refusals

    def on_inbox(self, message: Message) -> None:
        try:
            self._handle(message)
        except InvariantBroken as error:
            self._on_broken(error)

    def _handle(self, message: Message) -> None:
        try:
            inbox = decode_inbox(message.payload)
        except PeerError as error:
            self._refusals.note("inbox", error)
            return
        match inbox:
            case Dispatch(prompt=None):
                self._tasks.create_task(self._dispatch_from_record(inbox, message), name="read record")
            case Dispatch():
                self._answer_dispatch(inbox, message)
            case Cancel():
                self._core.on_cancel(inbox, self._now())
                self._after_event()
            case TellCache():
                self._core.prefix_log.restart()
                self._after_event()
            case RoleChange():
                self._on_role(inbox)

    def _answer_dispatch(self, dispatch: Dispatch, message: Message) -> None:
        try:
            reply = self._core.on_dispatch(dispatch, self._now())
        except PeerError as error:
            reply = _refusal(dispatch, "invalid_request", str(error))
        self._respond(message, reply)
        self._after_event()
        if reply.verdict == "accepted":
            self._failpoints.hit("dispatch.accepted", unpack_ids(dispatch.prompt or b""))

    async def _dispatch_from_record(self, dispatch: Dispatch, message: Message) -> None:
        """A prompt that would pass the broker's limit lies in the request record."""
        key = self._names.request_key(RequestId(dispatch.request_id))
        try:
            record = await self._world.store.read(key)
        except StoreUnavailable as error:
            self._respond(message, _refusal(dispatch, "unavailable", str(error)))
            return
        if record is None or PROMPT_FIELD not in record:
            self._respond(message, _refusal(dispatch, "invalid_request", "the request's record is gone"))
            return
        self._answer_dispatch(msgspec.structs.replace(dispatch, prompt=record[PROMPT_FIELD]), message)

    def _respond(self, message: Message, reply: DispatchReply) -> None:
        try:
            message.respond(encode(reply))
        except (BrokerUnavailable, PayloadTooLarge) as error:
            logger.warning("answer_lost", extra={"fields": {"reason": str(error)}})

    def on_replay(self, message: Message) -> None:
        try:
            request = decode_replay_request(message.payload)
        except PeerError as error:
            self._refusals.note("replay", error)
            return
        entries = self._core.on_replay(request.items, request.gateway, request.incarnation)
        try:
            message.respond(self._fitting_reply(entries))
        except (BrokerUnavailable, PayloadTooLarge) as error:
            logger.warning("answer_lost", extra={"fields": {"reason": str(error)}})

    def _fitting_reply(self, entries: list[ReplayEntry]) -> bytes:
        """What is cut off is asked for again."""
        more = False
        while True:
            identity = self._identity
            payload = encode(ReplayReply(worker=identity.worker, incarnation=identity.incarnation, entries=entries, more=more))
            if len(payload) <= self._world.broker.max_payload_bytes:
                return payload
            if len(entries) > 1:
                entries, more = entries[: len(entries) // 2], True
            elif entries and entries[0].new is not None and len(entries[0].new.tokens) > 1:
                entries, more = [msgspec.structs.replace(entries[0], new=_first_half(entries[0].new))], True
            else:
                return payload

    def _now(self) -> float:
        return time.monotonic()


def _first_half(new: NewTokens) -> NewTokens:
    half = len(new.tokens) // 2
    return msgspec.structs.replace(new, tokens=new.tokens[:half], logprobs=new.logprobs[:half], ending=None)


def _refusal(dispatch: Dispatch, code: str, message: str) -> DispatchReply:
    return DispatchReply(request_id=dispatch.request_id, attempt=dispatch.attempt, verdict="refused", code=code, message=message)
