"""What a gateway sends to workers over the broker, and their answers on the way back to the core: dispatches, cancels, probes."""

import logging
import time
from collections.abc import Awaitable, Callable

import msgspec

from common.mesh.gateway import GatewayCore
from common.mesh.gateway_effects import AskCache, SendCancel, SendDispatch, SendReplay
from common.ports.broker import Broker
from common.protocol.messages import Dispatch, ReplayRequest, TellCache, decode_dispatch_reply, decode_replay_reply, encode
from common.protocol.subjects import Names
from common.runtime.failpoints import Failpoints
from common.runtime.message_refusals import MessageRefusals
from common.values.errors import BrokerUnavailable, PayloadTooLarge, PeerError, SegueError, StoreUnavailable
from common.values.ids import GatewayId, Incarnation, RequestId

PING_TIMEOUT_S = 1.0
logger = logging.getLogger(__name__)


class WorkerMail:
    """`recorded` writes a request's attempt into its record, before its worker is told; False where nothing is to be sent any
    more. `told` turns the failure of a dispatch into what the client gets; `after_event` performs what the core decided."""

    def __init__(
        self,
        broker: Broker,
        names: Names,
        core: GatewayCore,
        *,
        owner: tuple[GatewayId, Incarnation],
        recorded: Callable[[RequestId], Awaitable[bool]],
        told: Callable[[SegueError], SegueError],
        after_event: Callable[[], None],
        refusals: MessageRefusals,
        failpoints: Failpoints,
    ) -> None:
        self._broker = broker
        self._names = names
        self._core = core
        self._owner = owner
        self._recorded = recorded
        self._told = told
        self._after_event = after_event
        self._refusals = refusals
        self._failpoints = failpoints

    async def dispatch(self, effect: SendDispatch) -> None:
        dispatch = effect.dispatch
        request_id = RequestId(dispatch.request_id)
        try:
            if not await self._recorded(request_id):
                return
            payload = await self._broker.request(
                self._names.worker_inbox(effect.worker), self._encoded(dispatch), timeout_s=effect.within_s
            )
            self._failpoints.hit("gateway.dispatched")
            reply = None if payload is None else decode_dispatch_reply(payload)
        except (StoreUnavailable, BrokerUnavailable, PayloadTooLarge) as error:
            self._core.abort(request_id, dispatch.attempt, self._told(error), time.monotonic())
        except PeerError as error:
            self._refusals.note("answer", error)
            self._core.on_dispatch_answer(request_id, dispatch.attempt, effect.worker, None, time.monotonic())
        else:
            self._core.on_dispatch_answer(request_id, dispatch.attempt, effect.worker, reply, time.monotonic())
        self._after_event()

    def cancel(self, effect: SendCancel) -> None:
        try:
            self._broker.publish(self._names.worker_inbox(effect.worker), encode(effect.cancel))
        except BrokerUnavailable as error:
            logger.warning("cancel_lost", extra={"fields": {"worker": effect.worker, "reason": str(error)}})

    def ask_cache(self, effect: AskCache) -> None:
        try:
            self._broker.publish(self._names.worker_inbox(effect.worker), encode(TellCache()))
        except BrokerUnavailable as error:
            logger.warning("question_lost", extra={"fields": {"worker": effect.worker, "reason": str(error)}})

    async def replay(self, effect: SendReplay) -> None:
        """One question, or several where it would pass the broker's limit."""
        question = encode(ReplayRequest(items=list(effect.items), gateway=self._owner[0], incarnation=self._owner[1]))
        if len(question) > self._broker.max_payload_bytes and len(effect.items) > 1:
            half = len(effect.items) // 2
            await self.replay(SendReplay(worker=effect.worker, items=effect.items[:half], within_s=effect.within_s))
            await self.replay(SendReplay(worker=effect.worker, items=effect.items[half:], within_s=effect.within_s))
            return
        reply = None
        alive = True
        try:
            payload = await self._broker.request(self._names.worker_replay(effect.worker), question, timeout_s=effect.within_s)
            if payload is not None:
                reply = decode_replay_reply(payload)
            else:
                alive = await self._broker.ping(timeout_s=PING_TIMEOUT_S)
        except (BrokerUnavailable, PayloadTooLarge):
            alive = False
        except PeerError as error:
            self._refusals.note("replay", error)
        if not alive:
            self._core.registry.refresh(time.monotonic())
        self._core.on_replay_answer(
            effect.worker,
            effect.items,
            None if reply is None else reply.entries,
            time.monotonic(),
            broker_alive=alive,
            incarnation=None if reply is None else Incarnation(reply.incarnation),
        )
        self._after_event()

    def _encoded(self, dispatch: Dispatch) -> bytes:
        """A prompt that would pass the broker's limit is left out: the worker reads it in the request record."""
        payload = encode(dispatch)
        if len(payload) > self._broker.max_payload_bytes:
            payload = encode(msgspec.structs.replace(dispatch, prompt=None))
        return payload
