"""The gateway's shell towards the mesh: carries dispatches, cancels, replays and tokens between the pure core and the broker.

The core owns requests and decides; this class performs its effects, each kind by a helper of its own: mail to workers, the
records of its requests, the models that workers serve.
"""

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence

from common.mesh.adoption import adopted_request, logged_tokens
from common.mesh.attachment import EndedElsewhere, Ours, TakenOver
from common.mesh.gateway import GatewayCore
from common.mesh.gateway_effects import (
    Accepted,
    AskCache,
    Deliver,
    Dropped,
    Ended,
    GatewayEffect,
    SendCancel,
    SendDispatch,
    SendReplay,
)
from common.mesh.owner_watch import SILENT_FOR_S
from common.mesh.request_keeper import RequestKeeper
from common.mesh.request_store import RequestStore
from common.ports.broker import Broker, Message
from common.ports.generation import Attached, GenerationRequest, RequestTimeline
from common.ports.state_store import StateStore
from common.protocol.messages import (
    GatewayBeat,
    decode_snapshot,
    decode_token_frame,
    encode,
)
from common.protocol.request_record import IdempotencyMark
from common.protocol.subjects import Names
from common.runtime.failpoints import Failpoints
from common.runtime.message_refusals import MessageRefusals
from common.values.errors import (
    BrokerUnavailable,
    ContextTooLong,
    IdempotencyKeyReused,
    InvalidRequest,
    InvariantBroken,
    Moved,
    PeerError,
    StoreUnavailable,
    StreamNotFound,
    Unavailable,
)
from common.values.ids import GatewayId, Incarnation, RequestId
from common.values.model_card import ModelCard
from services.gateway.admission import Admission
from services.gateway.live_generation import LiveGeneration, OwnedRequest
from services.gateway.model_directory import ModelDirectory
from services.gateway.recorded_request import ended_request, taken_over
from services.gateway.worker_mail import WorkerMail

BEAT_S = 1.0
KEEPING_S = 1.0
MAX_PROMPT_SCORES = 20_000
"""Prompt log-probabilities travel in one frame: (positions x alternatives) is bounded."""
logger = logging.getLogger(__name__)


class LiveMesh:
    """A MeshClient. `run` serves until it is cancelled; requests can be started from then on."""

    def __init__(
        self,
        *,
        gateway: GatewayId,
        incarnation: Incarnation,
        broker: Broker,
        store: StateStore,
        names: Names,
        failpoints: Failpoints | None = None,
    ) -> None:
        self._failpoints = failpoints or Failpoints()
        self._gateway = gateway
        self._incarnation = incarnation
        self._broker = broker
        self._store = store
        self._names = names
        self._core = GatewayCore(gateway=gateway, incarnation=incarnation, strays_from=self._now() + SILENT_FOR_S)
        self._admission = Admission()
        self.refusals = MessageRefusals()
        self._records = RequestStore(store, names, gateway=gateway, incarnation=incarnation, wall_clock=time.time)
        self._kept: RequestKeeper[OwnedRequest] = RequestKeeper(self._records, clock=self._now, on_lost=self._lose)
        self._mail = WorkerMail(
            broker,
            names,
            self._core,
            owner=(gateway, incarnation),
            recorded=self._record_attempt,
            told=lambda error: self._admission.told(error, self._now()),
            after_event=self._after_event,
            refusals=self.refusals,
            failpoints=self._failpoints,
        )
        self._models = ModelDirectory(store, names, self._core.registry, self._spawn)
        self._attaching: dict[RequestId, asyncio.Event] = {}
        self._active = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None

    @property
    def core(self) -> GatewayCore:
        return self._core

    async def run(self, started: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            subscriptions = [
                await self._broker.subscribe(self._names.gateway_tokens(self._gateway), self._on_frame),
                await self._broker.subscribe(self._names.all_snapshots, self._on_snapshot),
            ]
            tasks.create_task(self._run_ticks(), name="ticks")
            tasks.create_task(self._run_beats(), name="beats")
            tasks.create_task(self._run_keeping(), name="keep records")
            started.set()
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                self._tasks = None
                self._end_all()
                for subscription in subscriptions:
                    await subscription.close()

    def _end_all(self) -> None:
        """Nobody here will follow these requests any more: their readers are told. What lingers may be resumed elsewhere, the
        others' workers stop."""
        for owned in self._kept:
            lingers = owned.lingers and owned.is_recorded
            owned.finish(Unavailable("the gateway is stopping"))
            if not lingers:
                self._cancel(owned.request_id, None)

    async def first_cards(self, *, timeout_s: float) -> None:
        await self._models.first(timeout_s=timeout_s)

    # ------------------------------------------------------------------ MeshClient

    def cards(self) -> Sequence[ModelCard]:
        return self._models.cards()

    def card(self, name: str) -> ModelCard:
        return self._models.card(name)

    def readiness(self) -> dict[str, str]:
        problems: dict[str, str] = {}
        if not self._broker.connected:
            problems["broker"] = "not connected"
        if not self.cards():
            problems["workers"] = "no worker is ready"
        for snapshot in self._core.registry.all():
            if snapshot.unpaired and not snapshot.peers and snapshot.role != "both":
                fields = ", ".join(f"{peer}: {field}" for peer, field in sorted(snapshot.unpaired.items()))
                problems[f"worker {snapshot.worker}"] = f"can pair with nobody ({fields})"
        return problems

    async def start(self, request: GenerationRequest) -> LiveGeneration:
        card = self.card(request.model)
        _check(request, card)
        now = self._now()
        self._admission.check(broker_connected=self._broker.connected, now=now)
        if self._tasks is None:
            raise Unavailable("the gateway is stopping")
        owned = OwnedRequest(request, card.model, cancel_in_mesh=self._cancel, clock=self._now)
        generation = owned.read()
        self._core.start(
            request_id=request.request_id,
            model=card.model,
            prompt=request.prompt,
            sampling=request.sampling,
            choices=request.choices,
            salt=request.salt,
            deadline=None if request.deadline_s is None else now + request.deadline_s,
            now=now,
        )
        self._kept.add(owned)
        self._after_event()
        self._active.set()
        try:
            await asyncio.shield(owned.accepted)
        except BaseException:
            generation.cancel()
            await generation.close()
            raise
        return generation

    async def attach(self, request_id: RequestId, tenant: str) -> Attached:
        """One at a time for each request: two that adopted it here at once would cut each other off."""
        while (busy := self._attaching.get(request_id)) is not None:
            await busy.wait()
        self._attaching[request_id] = done = asyncio.Event()
        try:
            return await self._attach(request_id, tenant)
        finally:
            del self._attaching[request_id]
            done.set()

    async def timeline(self, request_id: RequestId, tenant: str) -> RequestTimeline:
        record = await self._records.find(request_id)
        if record is None or record.facts.tenant != tenant:
            raise StreamNotFound("there is no such request; what has ended is kept for ten minutes")
        return RequestTimeline(
            state=record.state,
            attempt=record.attempt,
            worker=record.worker,
            decode_worker=record.decode_worker,
            seconds=record.seconds,
        )

    async def claim(self, mark: IdempotencyMark, request_id: RequestId) -> RequestId:
        holder, digest = await self._records.claim(mark, request_id)
        if digest != mark.digest:
            raise IdempotencyKeyReused("this Idempotency-Key came with another body before; use a new key for a new request")
        return holder

    async def release(self, mark: IdempotencyMark, request_id: RequestId) -> None:
        await self._records.release(mark, request_id)

    # ------------------------------------------------------------------ attaching

    async def _attach(self, request_id: RequestId, tenant: str) -> Attached:
        found = await self._kept.attach(request_id, tenant, may_take=lambda: self._tasks is not None and self._broker.connected)
        match found:
            case Ours(owned=owned):
                return await self._join(owned)
            case EndedElsewhere():
                owned = ended_request(request_id, found.record, found.log, clock=self._now)
                return Attached(request=owned.request, generation=owned.read())
            case TakenOver():
                return self._adopt(request_id, found)

    async def _join(self, owned: OwnedRequest) -> Attached:
        """A request of ours. From now on somebody knows how to come back to it."""
        owned.lingers = True
        generation = owned.read()
        try:
            await asyncio.shield(owned.accepted)
        except BaseException:
            await generation.close()
            raise
        return Attached(request=owned.request, generation=generation)

    def _adopt(self, request_id: RequestId, taken: TakenOver) -> Attached:
        record, epoch, now = taken.record, taken.epoch, self._now()
        deadline_s = record.facts.deadline_s
        deadline = None if deadline_s is None else now + deadline_s  # anew: clocks are not compared between hosts
        request = adopted_request(request_id, record, taken.log, epoch=epoch, deadline=deadline)
        owned = taken_over(request_id, record, epoch=epoch, attempt=request.attempt, cancel_in_mesh=self._cancel, clock=self._now)
        generation = owned.read()
        self._kept.add(owned)
        logger.info("request_adopted", extra={"fields": {"request": request_id, "epoch": epoch, "from": record.owner}})
        self._core.adopt(request, logged_tokens(record.facts, taken.log), now)
        self._after_event()
        self._active.set()
        return Attached(request=owned.request, generation=generation)

    # ------------------------------------------------------------------ events

    def _on_frame(self, message: Message) -> None:
        try:
            frame = decode_token_frame(message.payload)
        except PeerError as error:
            self.refusals.note("frame", error)
            return
        self._core.on_frame(frame, self._now())
        self._after_event()

    def _on_snapshot(self, message: Message) -> None:
        try:
            heard = decode_snapshot(message.payload)
        except PeerError as error:
            self.refusals.note("snapshot", error)
            return
        self._core.on_snapshot(heard, self._now())
        if not heard.gone:
            self._models.heard(heard.snapshot)
        self._after_event()

    def _cancel(self, request_id: RequestId, choice: int | None) -> None:
        self._core.cancel(request_id, choice, self._now())
        self._after_event()
        owned = self._kept.get(request_id)
        if choice is not None and owned is not None and owned.is_recorded:
            self._spawn(self._kept.record_choice(owned, choice), "record choice")

    # ------------------------------------------------------------------ loops

    async def _run_ticks(self) -> None:
        while True:
            due = self._core.get_timer(self._now())
            if due is None:
                self._active.clear()
                await self._active.wait()
                continue
            await asyncio.sleep(due - self._now())
            if not self._broker.connected:
                self._core.registry.refresh(self._now())
            self._core.on_tick(self._now())
            self._after_event()

    async def _run_beats(self) -> None:
        """Each second: workers hear that we live; workers that fell silent go; nothing lingers too long. Waits for
        nobody: a pause here is taken for our own."""
        while True:
            self._publish_beat()
            self._admission.observe_broker(connected=self._broker.connected, now=self._now())
            if self._broker.connected:
                self._core.registry.expire(self._now())
            else:
                self._core.registry.refresh(self._now())
            self._core.counters["left_unread"] += self._kept.end_unread()
            await asyncio.sleep(BEAT_S)

    async def _run_keeping(self) -> None:
        while True:
            await asyncio.sleep(KEEPING_S)
            await self._kept.keep()

    def _lose(self, request_id: RequestId) -> None:
        self._core.drop(request_id, self._now())
        self._after_event()

    def _publish_beat(self) -> None:
        beat = GatewayBeat(gateway=self._gateway, incarnation=self._incarnation)
        try:
            self._broker.publish(self._names.gateway_beat(self._gateway), encode(beat))
        except BrokerUnavailable as error:
            logger.warning("beat_lost", extra={"fields": {"reason": str(error)}})

    # ------------------------------------------------------------------ effects

    def _after_event(self) -> None:
        for effect in self._core.take_effects():
            self._perform(effect)

    def _perform(self, effect: GatewayEffect) -> None:
        match effect:
            case SendDispatch():
                owned = self._kept.get(RequestId(effect.dispatch.request_id))
                if owned is not None:
                    owned.placed(effect.dispatch.attempt, effect.worker, effect.dispatch.decode_worker)
                self._spawn(self._mail.dispatch(effect), "dispatch")
            case SendCancel():
                self._mail.cancel(effect)
            case SendReplay():
                self._spawn(self._mail.replay(effect), "replay")
            case AskCache():
                self._mail.ask_cache(effect)
            case Accepted():
                self._of(effect.request_id).was_accepted()
            case Deliver():
                self._failpoints.hit("gateway.first_token" if effect.new.first == 0 else "gateway.delivering")
                self._of(effect.request_id).deliver(effect.choice, effect.new)
            case Ended():
                self._end(effect)
            case Dropped():
                self._kept.remove(effect.request_id).finish(Moved("another gateway goes on with this request: resume it there"))

    def _of(self, request_id: RequestId) -> OwnedRequest:
        owned = self._kept.get(request_id)
        if owned is None:
            raise InvariantBroken(f"the core runs {request_id}, which nobody owns")
        return owned

    def _spawn(self, coroutine: Coroutine[None, None, None], name: str) -> None:
        if self._tasks is not None:
            self._tasks.create_task(coroutine, name=name)
        else:
            coroutine.close()

    async def _record_attempt(self, request_id: RequestId) -> bool:
        """False where there is nothing to dispatch any more."""
        owned = self._kept.get(request_id)
        if owned is None:
            return False
        is_new = not owned.is_recorded
        try:
            is_wanted = await self._kept.record_placement(owned)
        except StoreUnavailable:
            self._admission.observe_store(works=False, now=self._now())
            raise
        if is_new:
            self._admission.observe_store(works=True, now=self._now())
        return is_wanted

    def _end(self, effect: Ended) -> None:
        owned = self._kept.remove(effect.request_id)
        owned.finish(effect.error)
        self._spawn(self._kept.record_end(owned, effect.error), "record end")

    def _now(self) -> float:
        return time.monotonic()


def _check(request: GenerationRequest, card: ModelCard) -> None:
    length = len(request.prompt)
    if length >= card.max_model_len:
        raise ContextTooLong(f"the prompt has {length} tokens; {card.model.name} takes at most {card.max_model_len - 1}")
    asked = request.sampling.prompt_logprobs
    if asked is not None and length * (asked + 1) > MAX_PROMPT_SCORES:
        message = f"prompt_logprobs times prompt tokens must stay below {MAX_PROMPT_SCORES}: ask for fewer, or a shorter prompt"
        raise InvalidRequest(message, param="prompt_logprobs")
