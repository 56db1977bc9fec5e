"""What a worker looks after while it serves: ticks, patience with peers, gateways that have fallen silent, its transport, its card."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine

from common.mesh.owner_watch import OwnerWatch
from common.mesh.worker import WorkerCore
from common.policy.watchdog import peer_silent_after_s
from common.ports.broker import Message
from common.protocol.messages import decode_gateway_beat
from common.protocol.subjects import Names
from common.runtime.message_refusals import MessageRefusals
from common.runtime.model_cards import CARD_RENEWAL_S, publish_card
from common.runtime.step_meter import StepMeter
from common.runtime.worker_parts import WorkerIdentity, WorkerWorld
from common.values.errors import PeerError, SegueError, StoreUnavailable, TransportBroken
from common.values.ids import GatewayId, Incarnation

TICK_S = 1.0
PING_TIMEOUT_S = 1.0
logger = logging.getLogger(__name__)


class WorkerWatches:
    """`after_event` performs what the core decided; `fail` stops the worker loudly."""

    def __init__(
        self,
        identity: WorkerIdentity,
        world: WorkerWorld,
        core: WorkerCore,
        names: Names,
        meter: StepMeter,
        refusals: MessageRefusals,
        *,
        after_event: Callable[..., None],
        drop_silent_peers: Callable[[float, float], object],
        fail: Callable[[SegueError], None],
    ) -> None:
        self._identity = identity
        self._world = world
        self._core = core
        self._names = names
        self._meter = meter
        self._refusals = refusals
        self._after_event = after_event
        self._drop_silent_peers = drop_silent_peers
        self._fail = fail
        self._owners = OwnerWatch()
        self._offered = asyncio.Event()
        self._unchecked = True

    def loops(self) -> tuple[Callable[[], Coroutine[None, None, None]], ...]:
        return (self._run_ticks, self._run_patience, self._renew_card, self._watch_owners, self._watch_transport)

    def offered(self) -> None:
        """An offer was made: the patience with its peer has begun."""
        self._offered.set()

    def changed(self) -> None:
        """Something happened since the core's invariants were looked at."""
        self._unchecked = True

    def on_gateway_beat(self, message: Message) -> None:
        try:
            beat = decode_gateway_beat(message.payload)
        except PeerError as error:
            self._refusals.note("beat", error)
            return
        self._owners.beat(GatewayId(beat.gateway), Incarnation(beat.incarnation), self._now())

    async def _run_ticks(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._core.on_tick(self._now())
            self._drop_silent_peers(self._now(), peer_silent_after_s(step_s=self._meter.seconds_per_step))
            if self._core.idle and self._unchecked:
                self._core.check_invariants()
                self._unchecked = False
            self._after_event(changed=False)

    async def _run_patience(self) -> None:
        """Offers that a silent or crowded peer leaves waiting are taken back at their time."""
        while True:
            self._offered.clear()
            due = self._core.patience_ends_at()
            try:
                async with asyncio.timeout(None if due is None else max(0.0, due - self._now())):
                    await self._offered.wait()
            except TimeoutError:
                self._core.end_patience(self._now())
                self._after_event()

    async def _watch_owners(self) -> None:
        """End what a gateway left behind that fell silent for good. Silence counts only while our broker answers."""
        while True:
            await asyncio.sleep(TICK_S)
            slept_since = self._now()
            answered = await self._world.broker.ping(timeout_s=PING_TIMEOUT_S)
            if not answered or self._now() - slept_since > PING_TIMEOUT_S:
                self._owners.refresh(self._now())
                continue
            for owner in self._owners.lost(self._core.owners(), self._now()):
                logger.warning("owner_lost", extra={"fields": {"gateway": owner.gateway}})
                self._core.on_owner_lost(owner, self._now())
                self._after_event()

    async def _watch_transport(self) -> None:
        """A worker that can move no KV is of no use to anybody: who watches it replaces it, and its streams go on elsewhere."""
        self._fail(TransportBroken(f"KV can be moved no more: {await self._world.transport.broken()}"))

    async def _renew_card(self) -> None:
        while True:
            await asyncio.sleep(CARD_RENEWAL_S)
            try:
                await publish_card(self._world.store, self._names, self._identity.card)
            except StoreUnavailable as error:
                logger.warning("card_not_renewed", extra={"fields": {"reason": str(error)}})

    def _now(self) -> float:
        return time.monotonic()
