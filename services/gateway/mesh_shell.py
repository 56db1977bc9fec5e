"""The gateway's shell around the pure core: carries what workers send to it, performs its effects, and keeps its time.

Each kind of effect has a helper of its own: mail to workers, the records of the requests that are owned here.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from random import Random

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
from common.policy.routing import PlacementRules
from common.ports.broker import Broker, Message
from common.ports.state_store import StateStore
from common.protocol.messages import (
    GatewayBeat,
    GatewayLoad,
    decode_snapshot,
    decode_token_frame,
    encode,
)
from common.protocol.subjects import Names
from common.runtime.failpoints import Failpoints
from common.runtime.message_refusals import MessageRefusals
from common.values.errors import (
    BrokerUnavailable,
    InvariantBroken,
    Moved,
    PeerError,
    StoreUnavailable,
    Unavailable,
)
from common.values.ids import GatewayId, Incarnation, RequestId
from common.values.request_account import RequestAccount
from common.values.slo import Slo
from services.gateway.admission import Admission
from services.gateway.live_generation import OwnedRequest
from services.gateway.model_directory import ModelDirectory
from services.gateway.worker_mail import WorkerMail

BEAT_S = 1.0
KEEPING_S = 1.0
logger = logging.getLogger(__name__)


class MeshShell:
    """`run` serves until it is cancelled; requests can be added from then on."""

    def __init__(
        self,
        *,
        gateway: GatewayId,
        incarnation: Incarnation,
        broker: Broker,
        store: StateStore,
        names: Names,
        failpoints: Failpoints,
        slo: Slo,
        rules: PlacementRules,
    ) -> None:
        self._failpoints = failpoints
        self._gateway = gateway
        self._incarnation = incarnation
        self._broker = broker
        self._store = store
        self._names = names
        self._free = rules.free
        self.core = GatewayCore(
            gateway=gateway,
            incarnation=incarnation,
            slo=slo,
            strays_from=self.now() + SILENT_FOR_S,
            rules=rules,
            draws=Random(gateway),
        )
        self.admission = Admission()
        self.refusals = MessageRefusals()
        self.records = RequestStore(store, names, gateway=gateway, incarnation=incarnation, wall_clock=time.time)
        self.kept: RequestKeeper[OwnedRequest] = RequestKeeper(self.records, clock=self.now, on_lost=self._lose)
        self._mail = WorkerMail(
            broker,
            names,
            self.core,
            owner=(gateway, incarnation),
            recorded=self._record_attempt,
            told=lambda error: self.admission.told(error, self.now()),
            after_event=self.after_event,
            refusals=self.refusals,
            failpoints=self._failpoints,
        )
        self.models = ModelDirectory(store, names, self.core.registry, self.spawn)
        self.on_account: Callable[[RequestAccount], None] = _nobody_counts
        self._active = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None

    @property
    def is_running(self) -> bool:
        return self._tasks is not None

    @property
    def may_take(self) -> bool:
        """Whether another gateway's request may be taken over now."""
        return self._tasks is not None and self._broker.connected

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
        for owned in self.kept:
            lingers = owned.lingers and owned.is_recorded
            owned.finish(Unavailable("the gateway is stopping"))
            if not lingers:
                self.cancel(owned.request_id, None)

    def add(self, owned: OwnedRequest) -> None:
        """A request that the core has just been given."""
        self.kept.add(owned)
        self.after_event()
        self._active.set()

    def _on_frame(self, message: Message) -> None:
        try:
            frame = decode_token_frame(message.payload)
        except PeerError as error:
            self.refusals.note("frame", error)
            return
        self.core.on_frame(frame, self.now())
        self.after_event()

    def _on_snapshot(self, message: Message) -> None:
        try:
            heard = decode_snapshot(message.payload)
        except PeerError as error:
            self.refusals.note("snapshot", error)
            return
        self.core.on_snapshot(heard, self.now())
        if not heard.gone:
            self.models.heard(heard.snapshot)
        self.after_event()

    def cancel(self, request_id: RequestId, choice: int | None) -> None:
        self.core.cancel(request_id, choice, self.now())
        self.after_event()
        owned = self.kept.get(request_id)
        if choice is not None and owned is not None and owned.is_recorded:
            self.spawn(self.kept.record_choice(owned, choice), "record choice")

    # ------------------------------------------------------------------ loops

    async def _run_ticks(self) -> None:
        while True:
            due = self.core.get_timer(self.now())
            if due is None:
                self._active.clear()
                await self._active.wait()
                continue
            await asyncio.sleep(due - self.now())
            if not self._broker.connected:
                self.core.registry.refresh(self.now())
            self.core.on_tick(self.now())
            self.after_event()

    async def _run_beats(self) -> None:
        """Each second: workers hear that we live; workers that fell silent go; nothing lingers too long. Waits for
        nobody: a pause here is taken for our own."""
        while True:
            self._publish_beat()
            self.admission.observe_broker(connected=self._broker.connected, now=self.now())
            if self._broker.connected:
                self.core.registry.expire(self.now())
            else:
                self.core.registry.refresh(self.now())
            self.core.counters["left_unread"] += self.kept.end_unread()
            await asyncio.sleep(BEAT_S)

    async def _run_keeping(self) -> None:
        while True:
            await asyncio.sleep(KEEPING_S)
            await self.kept.keep()

    def _lose(self, request_id: RequestId) -> None:
        self.core.drop(request_id, self.now())
        self.after_event()

    def _publish_beat(self) -> None:
        beat = GatewayBeat(gateway=self._gateway, incarnation=self._incarnation)
        arrivals = self.core.arrivals.take()
        load = GatewayLoad(gateway=self._gateway, incarnation=self._incarnation, models=arrivals, free=self._free)
        try:
            self._broker.publish(self._names.gateway_beat(self._gateway), encode(beat))
            self._broker.publish(self._names.gateway_load(self._gateway), encode(load))
        except BrokerUnavailable as error:
            logger.warning("beat_lost", extra={"fields": {"reason": str(error)}})

    # ------------------------------------------------------------------ effects

    def after_event(self) -> None:
        for effect in self.core.take_effects():
            self._perform(effect)

    def _perform(self, effect: GatewayEffect) -> None:
        match effect:
            case SendDispatch():
                owned = self.kept.get(RequestId(effect.dispatch.request_id))
                if owned is not None:
                    owned.placed(effect.dispatch.attempt, effect.worker, effect.dispatch.decode_worker)
                self.spawn(self._mail.dispatch(effect), "dispatch")
            case SendCancel():
                self._mail.cancel(effect)
            case SendReplay():
                self.spawn(self._mail.replay(effect), "replay")
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
                self.kept.remove(effect.request_id).finish(Moved("another gateway goes on with this request: resume it there"))

    def _of(self, request_id: RequestId) -> OwnedRequest:
        owned = self.kept.get(request_id)
        if owned is None:
            raise InvariantBroken(f"the core runs {request_id}, which nobody owns")
        return owned

    def spawn(self, coroutine: Coroutine[None, None, None], name: str) -> None:
        if self._tasks is not None:
            self._tasks.create_task(coroutine, name=name)
        else:
            coroutine.close()

    async def _record_attempt(self, request_id: RequestId) -> bool:
        """False where there is nothing to dispatch any more."""
        owned = self.kept.get(request_id)
        if owned is None:
            return False
        is_new = not owned.is_recorded
        try:
            is_wanted = await self.kept.record_placement(owned)
        except StoreUnavailable:
            self.admission.observe_store(works=False, now=self.now())
            raise
        if is_new:
            self.admission.observe_store(works=True, now=self.now())
        return is_wanted

    def _end(self, effect: Ended) -> None:
        owned = self.kept.remove(effect.request_id)
        owned.account = effect.account
        if effect.account is not None:
            self.on_account(effect.account)
        owned.finish(effect.error)
        self.spawn(self.kept.record_end(owned, effect.error), "record end")

    def now(self) -> float:
        return time.monotonic()


def _nobody_counts(account: RequestAccount) -> None:
    """Until metrics are there."""
