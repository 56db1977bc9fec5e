"""The gateway's shell towards the mesh: carries dispatches, cancels, replays and tokens between the pure core and the broker.

The core owns requests and decides; this class performs its effects, keeps the request records in the store, and knows the
models by the cards that their workers publish.
"""

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence

import msgspec

from common.mesh.gateway import GatewayCore
from common.mesh.gateway_effects import Accepted, AskCache, Deliver, Ended, GatewayEffect, SendCancel, SendDispatch, SendReplay
from common.ports.broker import Broker, Message
from common.ports.generation import GenerationRequest
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
    pack_ids,
)
from common.protocol.request_record import (
    ENDED_TTL_S,
    RENEWAL_S,
    RUNNING_TTL_S,
    attempt_change,
    ending_change,
    first_record,
)
from common.protocol.subjects import Names
from common.runtime.failpoints import Failpoints
from common.runtime.model_cards import read_card
from common.values.errors import (
    BrokerUnavailable,
    ContextTooLong,
    InvalidRequest,
    ModelNotFound,
    PayloadTooLarge,
    PeerError,
    StoreUnavailable,
    Unavailable,
)
from common.values.ids import GatewayId, Incarnation, ModelKey, RequestId
from common.values.model_card import ModelCard
from services.gateway.admission import Admission
from services.gateway.live_generation import LiveGeneration

DISPATCH_TIMEOUT_S = 2.0
REPLAY_TIMEOUT_S = 1.0
PING_TIMEOUT_S = 1.0
CARD_RETRY_S = 1.0
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
        self._generations: dict[RequestId, LiveGeneration] = {}
        self._requests: dict[RequestId, GenerationRequest] = {}
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
            tasks.create_task(self._run_expiry(), name="expire workers")
            tasks.create_task(self._run_renewals(), name="renew records")
            started.set()
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                self._tasks = None
                self._end_all()
                for subscription in subscriptions:
                    await subscription.close()

    def _end_all(self) -> None:
        """Nobody will follow these requests any more: their readers are told, their workers stop."""
        for request_id, generation in list(self._generations.items()):
            generation.finish(Unavailable("the gateway is stopping"))
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
        generation = LiveGeneration(request.request_id, self._cancel, now)
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
        self._generations[request.request_id] = generation
        self._requests[request.request_id] = request
        self._after_event()
        self._active.set()
        try:
            await asyncio.shield(generation.accepted)
        except BaseException:
            generation.cancel()
            raise
        return generation

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

    async def _run_expiry(self) -> None:
        """Workers that fell silent go; never because the broker is away. Waits for nobody: a pause here is taken for our own."""
        while True:
            await asyncio.sleep(1.0)
            self._publish_beat()
            self._admission.observe_broker(connected=self._broker.connected, now=self._now())
            if self._broker.connected:
                self._core.registry.expire(self._now())
            else:
                self._core.registry.refresh(self._now())

    async def _run_renewals(self) -> None:
        """Running requests keep their records."""
        while True:
            await asyncio.sleep(RENEWAL_S)
            for request_id in self._core.active_ids():
                try:
                    await self._store.refresh(self._names.request_key(request_id), ttl_s=RUNNING_TTL_S)
                except StoreUnavailable as error:
                    logger.warning("record_not_renewed", extra={"fields": {"reason": str(error)}})
                    break

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
                self._spawn(self._dispatch(effect), "dispatch")
            case SendCancel():
                self._publish_cancel(effect)
            case SendReplay():
                self._spawn(self._replay(effect), "replay")
            case AskCache():
                self._ask_cache(effect)
            case Accepted():
                accepted = self._generations[effect.request_id].accepted
                if not accepted.done():
                    accepted.set_result(None)
            case Deliver():
                self._failpoints.hit("gateway.first_token" if effect.new.first == 0 else "gateway.delivering")
                self._generations[effect.request_id].deliver(effect.choice, effect.new, self._now())
            case Ended():
                self._end(effect)

    def _spawn(self, coroutine: Coroutine[None, None, None], name: str) -> None:
        if self._tasks is not None:
            self._tasks.create_task(coroutine, name=name)
        else:
            coroutine.close()

    async def _dispatch(self, effect: SendDispatch) -> None:
        dispatch = effect.dispatch
        request_id = RequestId(dispatch.request_id)
        try:
            await self._record_attempt(request_id, effect)
            if request_id not in self._generations:
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

    async def _record_attempt(self, request_id: RequestId, effect: SendDispatch) -> None:
        """The record shows an attempt before its worker is told. Without the store nothing new is admitted; a request that
        runs already may be placed again all the same."""
        dispatch = effect.dispatch
        change = attempt_change(dispatch.attempt, effect.worker, dispatch.decode_worker)
        key = self._names.request_key(request_id)
        if dispatch.attempt == 1:
            request = self._requests.get(request_id)
            if request is None:
                return
            record = first_record(
                gateway=self._gateway,
                model=dispatch.model,
                prompt=pack_ids(request.prompt),
                sampling=request.sampling,
                choices=request.choices,
                body=request.body,
                created=time.time(),
            )
            try:
                created = await self._store.create(key, {**record, **change}, ttl_s=RUNNING_TTL_S)
            except StoreUnavailable:
                self._admission.observe_store(works=False, now=self._now())
                raise
            self._admission.observe_store(works=True, now=self._now())
            if not created:
                raise StoreUnavailable("a request of this id is there already", retry_after_s=1.0)
            if request_id not in self._generations:  # it ended meanwhile, when there was no record to write that into
                gone = ending_change("ended", seconds={}, tokens=0)
                await self._store.update_if(key, expected={"owner": self._gateway.encode()}, changes=gone, ttl_s=ENDED_TTL_S)
            return
        try:
            expected = {"owner": self._gateway.encode()}
            if not await self._store.update_if(key, expected=expected, changes=change, ttl_s=RUNNING_TTL_S):
                logger.warning("record_lost", extra={"fields": {"request": request_id}})
        except StoreUnavailable as error:
            logger.warning("attempt_not_recorded", extra={"fields": {"request": request_id, "reason": str(error)}})

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
        entries = None
        alive = True
        try:
            payload = await self._broker.request(self._names.worker_replay(effect.worker), question, timeout_s=REPLAY_TIMEOUT_S)
            if payload is not None:
                entries = decode_replay_reply(payload).entries
            else:
                alive = await self._broker.ping(timeout_s=PING_TIMEOUT_S)
        except (BrokerUnavailable, PayloadTooLarge):
            alive = False
        except PeerError as error:
            logger.warning("malformed_replay", extra={"fields": {"worker": effect.worker, "reason": str(error)}})
        if not alive:
            self._core.registry.refresh(self._now())
        self._core.on_replay_answer(effect.worker, effect.items, entries, self._now(), broker_alive=alive)
        self._after_event()

    def _end(self, effect: Ended) -> None:
        generation = self._generations.pop(effect.request_id)
        self._requests.pop(effect.request_id, None)
        generation.finish(effect.error)
        self._spawn(self._record_end(generation, effect), "record end")

    async def _record_end(self, generation: LiveGeneration, effect: Ended) -> None:
        seconds = {"end": self._now() - generation.started}
        if generation.first_token is not None:
            seconds["first_token"] = generation.first_token - generation.started
        change = ending_change("failed" if effect.error else "ended", seconds=seconds, tokens=generation.tokens)
        key = self._names.request_key(effect.request_id)
        try:
            await self._store.update_if(key, expected={"owner": self._gateway.encode()}, changes=change, ttl_s=ENDED_TTL_S)
        except StoreUnavailable as error:
            logger.warning("end_not_recorded", extra={"fields": {"request": effect.request_id, "reason": str(error)}})

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
