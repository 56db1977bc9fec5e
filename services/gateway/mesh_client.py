"""The gateway's shell towards the mesh: carries dispatches, cancels, replays and tokens between the pure core and the broker.

The core owns requests and decides; this class performs its effects, keeps the request records in the store, and knows the
models by the cards that their workers publish.
"""

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence

import msgspec

from common.mesh.adoption import adopted_request, logged_tokens
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
from common.ports.broker import Broker, Message
from common.ports.generation import Attached, GenerationRequest
from common.ports.state_store import StateStore
from common.protocol.messages import (
    Dispatch,
    GatewayBeat,
    ReplayRequest,
    TellCache,
    decode_dispatch_reply,
    decode_replay_reply,
    decode_snapshot,
    decode_token_frame,
    encode,
)
from common.protocol.request_record import RENEWAL_S, IdempotencyMark, RequestRecord
from common.protocol.subjects import Names
from common.runtime.failpoints import Failpoints
from common.runtime.model_cards import read_card
from common.values.errors import (
    BrokerUnavailable,
    ContextTooLong,
    IdempotencyKeyReused,
    InvalidRequest,
    ModelNotFound,
    Moved,
    PayloadTooLarge,
    PeerError,
    RequestFailed,
    SegueError,
    StoreUnavailable,
    StreamNotFound,
    Unavailable,
)
from common.values.ids import GatewayId, Incarnation, ModelKey, RequestId
from common.values.model_card import ModelCard
from services.gateway.admission import Admission
from services.gateway.live_generation import LiveGeneration, OwnedRequest
from services.gateway.request_store import RequestStore

DISPATCH_TIMEOUT_S = 2.0
REPLAY_TIMEOUT_S = 1.0
PING_TIMEOUT_S = 1.0
CARD_RETRY_S = 1.0
BEAT_S = 1.0
LINGER_S = 30.0
"""How long a request that can be resumed lives on without a reader."""
MAX_LINGERING = 1024
MAX_TAKE_OVERS = 4
"""Tries, where other gateways take the same request over at the same time."""
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
        self._core = GatewayCore(gateway=gateway, incarnation=incarnation)
        self._admission = Admission()
        self._records = RequestStore(store, names, gateway=gateway, incarnation=incarnation)
        self._owned: dict[RequestId, OwnedRequest] = {}
        self._unrecorded: set[RequestId] = set()
        self._cards: dict[ModelKey, ModelCard] = {}
        self._loading_cards: set[ModelKey] = set()
        self._active = asyncio.Event()
        self._card_loaded = asyncio.Event()
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
            tasks.create_task(self._run_record_keeping(), name="keep records")
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
        for request_id, owned in list(self._owned.items()):
            lingers = owned.lingers and owned.is_recorded
            owned.finish(Unavailable("the gateway is stopping"))
            if not lingers:
                self._cancel(request_id, None)

    async def first_cards(self, *, timeout_s: float) -> None:
        """Wait until a model can be served, but not for ever: a gateway that restarts should not say that there is none."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._card_loaded.wait()
        except TimeoutError:
            logger.info("no_model_yet")

    # ------------------------------------------------------------------ MeshClient

    def cards(self) -> Sequence[ModelCard]:
        newest: dict[str, ModelCard] = {}
        for model in self._core.registry.models():
            card = self._cards.get(model)
            if card is not None and (model.name not in newest or card.created >= newest[model.name].created):
                newest[model.name] = card
        return sorted(newest.values(), key=lambda card: card.model.name)

    def card(self, name: str) -> ModelCard:
        cards = self.cards()
        if not cards:
            raise Unavailable("no worker is ready yet", retry_after_s=2.0)
        for card in cards:
            if card.model.name == name:
                return card
        there = ", ".join(card.model.name for card in cards)
        raise ModelNotFound(f"there is no model {name!r}; models served now: {there}", param="model")

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
        self._owned[request.request_id] = owned
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
        for _ in range(MAX_TAKE_OVERS):
            record = await self._record_of(request_id)
            owned = self._owned.get(request_id)
            if owned is not None and owned.request.tenant == tenant:
                if record is None or (record.owner, record.epoch) == (self._gateway, owned.epoch):
                    return await self._join(owned)
                self._lose(request_id)  # somebody has taken it over, and we had not heard yet
            if record is None or record.facts.tenant != tenant:
                raise StreamNotFound("there is no such stream, or it ended too long ago")
            if record.state != "running":
                return await self._ended(request_id, record)
            if self._tasks is None or not self._broker.connected:
                raise BrokerUnavailable("the message broker is not connected", retry_after_s=2.0)
            epoch = await self._records.take_over(request_id, record)
            if epoch is not None:
                return await self._adopt(request_id, record, epoch)
        raise Unavailable("other gateways are taking this stream over", retry_after_s=1.0)

    async def _record_of(self, request_id: RequestId) -> RequestRecord | None:
        """None also for a request of ours while the store is away: nobody takes over then."""
        try:
            return await self._records.find(request_id)
        except StoreUnavailable:
            if request_id in self._owned:
                return None
            raise

    async def claim(self, mark: IdempotencyMark, request_id: RequestId) -> RequestId:
        holder, digest = await self._records.claim(mark, request_id)
        if digest != mark.digest:
            raise IdempotencyKeyReused("this Idempotency-Key came with another body before; use a new key for a new request")
        return holder

    async def release(self, mark: IdempotencyMark, request_id: RequestId) -> None:
        await self._records.release(mark, request_id)

    # ------------------------------------------------------------------ attaching

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

    async def _ended(self, request_id: RequestId, record: RequestRecord) -> Attached:
        """Nothing runs any more: its log is read again, and then its error, where it ended with one."""
        owned = self._own(request_id, record, record.epoch)
        for choice, new in logged_tokens(record.facts, await self._records.log(request_id)).items():
            owned.deliver(choice, new)
        failed = record.error
        owned.finish(None if failed is None else RequestFailed(failed.message, code=failed.code, status=failed.status))
        return Attached(request=owned.request, generation=owned.read())

    async def _adopt(self, request_id: RequestId, record: RequestRecord, epoch: int) -> Attached:
        log = await self._records.log(request_id)
        now = self._now()
        deadline_s = record.facts.deadline_s
        deadline = None if deadline_s is None else now + deadline_s  # anew: clocks are not compared between hosts
        request = adopted_request(request_id, record, log, epoch=epoch, deadline=deadline)
        owned = self._own(request_id, record, epoch)
        owned.attempt, owned.worker, owned.decode_worker = request.attempt, record.worker, record.decode_worker
        owned.is_recorded = True
        owned.accepted.set_result(None)
        generation = owned.read()
        self._owned[request_id] = owned
        logger.info("request_adopted", extra={"fields": {"request": request_id, "epoch": epoch, "from": record.owner}})
        self._core.adopt(request, logged_tokens(record.facts, log), now)
        self._after_event()
        self._active.set()
        return Attached(request=owned.request, generation=generation)

    def _own(self, request_id: RequestId, record: RequestRecord, epoch: int) -> OwnedRequest:
        facts = record.facts
        request = GenerationRequest(
            request_id=request_id,
            model=facts.model.name,
            prompt=record.prompt,
            sampling=facts.sampling,
            choices=facts.choices,
            body=facts.body,
            salt=facts.salt,
            deadline_s=facts.deadline_s,
            tenant=facts.tenant,
            lingers=True,
            keep_prompt=facts.keep_prompt,
            idempotency=facts.idempotency,
        )
        return OwnedRequest(request, facts.model, cancel_in_mesh=self._cancel, clock=self._now, epoch=epoch)

    # ------------------------------------------------------------------ events

    def _on_frame(self, message: Message) -> None:
        try:
            frame = decode_token_frame(message.payload)
        except PeerError as error:
            logger.warning("malformed_frame", extra={"fields": {"reason": str(error)}})
            return
        self._core.on_frame(frame, self._now())
        self._after_event()

    def _on_snapshot(self, message: Message) -> None:
        try:
            heard = decode_snapshot(message.payload)
        except PeerError as error:
            logger.warning("malformed_snapshot", extra={"fields": {"reason": str(error)}})
            return
        self._core.on_snapshot(heard, self._now())
        model = heard.snapshot.model
        card = self._cards.get(model)
        known = card is not None and card.max_model_len == heard.snapshot.max_model_len
        if not heard.gone and not known and model not in self._loading_cards and self._tasks is not None:
            self._loading_cards.add(model)
            self._tasks.create_task(self._load_card(model), name=f"card {model.name}")
        self._after_event()

    def _cancel(self, request_id: RequestId, choice: int | None) -> None:
        self._core.cancel(request_id, choice, self._now())
        self._after_event()
        owned = self._owned.get(request_id)
        if choice is not None and owned is not None and owned.is_recorded:
            self._spawn(self._record_choice(owned, choice), "record choice")

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
            self._end_unread()
            await asyncio.sleep(BEAT_S)

    def _end_unread(self) -> None:
        """In the order in which their readers left; also the oldest ones where too many linger."""
        lingering = [(owned.unread_since, owned) for owned in self._owned.values() if owned.unread_since is not None]
        lingering.sort(key=lambda pair: pair[0])
        for place, (since, owned) in enumerate(lingering):
            if self._now() - since > LINGER_S or len(lingering) - place > MAX_LINGERING:
                self._core.counters["left_unread"] += 1
                owned.cancel(None)

    async def _run_record_keeping(self) -> None:
        """Running requests keep their records. After an empty restart of the store, or where an attempt could not be recorded,
        they are written again within a second or so."""
        renewed_at = self._now()
        while True:
            await asyncio.sleep(BEAT_S)
            try:
                if await self._records.was_emptied():
                    self._unrecorded.update(request_id for request_id, owned in self._owned.items() if owned.is_recorded)
                for request_id in list(self._unrecorded):
                    await self._restore(request_id)
                if self._now() - renewed_at >= RENEWAL_S:
                    renewed_at = self._now()
                    await self._renew_all()
            except StoreUnavailable as error:
                logger.warning("records_not_kept", extra={"fields": {"reason": str(error)}})

    async def _restore(self, request_id: RequestId) -> None:
        owned = self._owned.get(request_id)
        if owned is not None and await self._records.restore(owned) == "lost":
            self._lose(request_id)
        self._unrecorded.discard(request_id)

    async def _renew_all(self) -> None:
        for owned in list(self._owned.values()):
            if owned.is_recorded and not await self._records.renew(owned):
                self._unrecorded.add(owned.request_id)

    def _lose(self, request_id: RequestId) -> None:
        self._core.drop(request_id, self._now())
        self._after_event()

    def _publish_beat(self) -> None:
        beat = GatewayBeat(gateway=self._gateway, incarnation=self._incarnation)
        try:
            self._broker.publish(self._names.gateway_beat(self._gateway), encode(beat))
        except BrokerUnavailable as error:
            logger.warning("beat_lost", extra={"fields": {"reason": str(error)}})

    async def _load_card(self, model: ModelKey) -> None:
        try:
            card = await read_card(self._store, self._names, model)
            if card is not None:
                self._cards[model] = card
                self._card_loaded.set()
            else:
                await asyncio.sleep(CARD_RETRY_S)
        except (StoreUnavailable, PeerError) as error:
            logger.warning("card_not_read", extra={"fields": {"model": model.name, "reason": str(error)}})
            await asyncio.sleep(CARD_RETRY_S)
        finally:
            self._loading_cards.discard(model)

    # ------------------------------------------------------------------ effects

    def _after_event(self) -> None:
        for effect in self._core.take_effects():
            self._perform(effect)

    def _perform(self, effect: GatewayEffect) -> None:
        match effect:
            case SendDispatch():
                owned = self._owned.get(RequestId(effect.dispatch.request_id))
                if owned is not None:
                    owned.placed(effect.dispatch.attempt, effect.worker, effect.dispatch.decode_worker)
                self._spawn(self._dispatch(effect), "dispatch")
            case SendCancel():
                self._publish_cancel(effect)
            case SendReplay():
                self._spawn(self._replay(effect), "replay")
            case AskCache():
                self._ask_cache(effect)
            case Accepted():
                accepted = self._owned[effect.request_id].accepted
                if not accepted.done():
                    accepted.set_result(None)
            case Deliver():
                self._failpoints.hit("gateway.first_token" if effect.new.first == 0 else "gateway.delivering")
                self._owned[effect.request_id].deliver(effect.choice, effect.new)
            case Ended():
                self._end(effect)
            case Dropped():
                self._owned.pop(effect.request_id).finish(
                    Moved(
                        "another gateway goes on with this request: resume the stream, or repeat the request with its Idempotency-Key"
                    )
                )

    def _spawn(self, coroutine: Coroutine[None, None, None], name: str) -> None:
        if self._tasks is not None:
            self._tasks.create_task(coroutine, name=name)
        else:
            coroutine.close()

    async def _dispatch(self, effect: SendDispatch) -> None:
        dispatch = effect.dispatch
        request_id = RequestId(dispatch.request_id)
        try:
            if not await self._record_attempt(request_id, dispatch.attempt):
                return
            payload = await self._broker.request(
                self._names.worker_inbox(effect.worker), self._encoded(dispatch), timeout_s=DISPATCH_TIMEOUT_S
            )
            self._failpoints.hit("gateway.dispatched")
            reply = None if payload is None else decode_dispatch_reply(payload)
        except (StoreUnavailable, BrokerUnavailable, PayloadTooLarge) as error:
            self._core.abort(request_id, dispatch.attempt, self._admission.told(error, self._now()), self._now())
        except PeerError as error:
            logger.warning("malformed_answer", extra={"fields": {"worker": effect.worker, "reason": str(error)}})
            self._core.on_dispatch_answer(request_id, dispatch.attempt, effect.worker, None, self._now())
        else:
            self._core.on_dispatch_answer(request_id, dispatch.attempt, effect.worker, reply, self._now())
        self._after_event()

    def _encoded(self, dispatch: Dispatch) -> bytes:
        """A prompt that would pass the broker's limit is left out: the worker reads it in the request record."""
        payload = encode(dispatch)
        if len(payload) > self._broker.max_payload_bytes:
            payload = encode(msgspec.structs.replace(dispatch, prompt=None))
        return payload

    async def _record_attempt(self, request_id: RequestId, attempt: int) -> bool:
        """The record shows an attempt before its worker is told. Without the store nothing new is admitted; a request that
        runs already may be placed again all the same. False where there is nothing to dispatch any more."""
        owned = self._owned.get(request_id)
        if owned is None:
            return False
        if not owned.is_recorded:
            try:
                await self._records.admit(owned)
            except StoreUnavailable:
                self._admission.observe_store(works=False, now=self._now())
                raise
            self._admission.observe_store(works=True, now=self._now())
            if request_id not in self._owned:  # it ended meanwhile, when there was no record to write that into
                await self._record_end(owned, None)
        else:
            try:
                if await self._records.record_attempt(owned) == "lost":
                    self._lose(request_id)
            except StoreUnavailable as error:
                logger.warning("attempt_not_recorded", extra={"fields": {"request": request_id, "reason": str(error)}})
                self._unrecorded.add(request_id)
        return request_id in self._owned

    def _publish_cancel(self, effect: SendCancel) -> None:
        try:
            self._broker.publish(self._names.worker_inbox(effect.worker), encode(effect.cancel))
        except BrokerUnavailable as error:
            logger.warning("cancel_lost", extra={"fields": {"worker": effect.worker, "reason": str(error)}})

    def _ask_cache(self, effect: AskCache) -> None:
        try:
            self._broker.publish(self._names.worker_inbox(effect.worker), encode(TellCache()))
        except BrokerUnavailable as error:
            logger.warning("question_lost", extra={"fields": {"worker": effect.worker, "reason": str(error)}})

    async def _replay(self, effect: SendReplay) -> None:
        """One question, or several where it would pass the broker's limit."""
        question = encode(ReplayRequest(items=list(effect.items), gateway=self._gateway, incarnation=self._incarnation))
        if len(question) > self._broker.max_payload_bytes and len(effect.items) > 1:
            half = len(effect.items) // 2
            await self._replay(SendReplay(worker=effect.worker, items=effect.items[:half]))
            await self._replay(SendReplay(worker=effect.worker, items=effect.items[half:]))
            return
        reply = None
        alive = True
        try:
            payload = await self._broker.request(self._names.worker_replay(effect.worker), question, timeout_s=REPLAY_TIMEOUT_S)
            if payload is not None:
                reply = decode_replay_reply(payload)
            else:
                alive = await self._broker.ping(timeout_s=PING_TIMEOUT_S)
        except (BrokerUnavailable, PayloadTooLarge):
            alive = False
        except PeerError as error:
            logger.warning("malformed_replay", extra={"fields": {"worker": effect.worker, "reason": str(error)}})
        if not alive:
            self._core.registry.refresh(self._now())
        self._core.on_replay_answer(
            effect.worker,
            effect.items,
            None if reply is None else reply.entries,
            self._now(),
            broker_alive=alive,
            incarnation=None if reply is None else Incarnation(reply.incarnation),
        )
        self._after_event()

    def _end(self, effect: Ended) -> None:
        owned = self._owned.pop(effect.request_id)
        self._unrecorded.discard(effect.request_id)
        owned.finish(effect.error)
        self._spawn(self._record_end(owned, effect.error), "record end")

    async def _record_end(self, owned: OwnedRequest, error: SegueError | None) -> None:
        try:
            await self._records.record_end(owned, error, self._now())
        except StoreUnavailable as unavailable:
            logger.warning("end_not_recorded", extra={"fields": {"request": owned.request_id, "reason": str(unavailable)}})

    async def _record_choice(self, owned: OwnedRequest, choice: int) -> None:
        try:
            await self._records.record_choice(owned, choice)
        except StoreUnavailable as error:
            logger.warning("choice_not_recorded", extra={"fields": {"request": owned.request_id, "reason": str(error)}})

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
