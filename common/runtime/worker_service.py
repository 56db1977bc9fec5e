"""The worker's shell: carries messages, steps, seals and pulls between the pure core and the world.

Every event is handled in one synchronous block: the core decides, then its effects are performed. Nothing computes on the
event loop: steps have their own thread behind the StepEngine, seals run in one thread here, copies in the transport's.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine

from common.mesh.worker import WorkerCore
from common.mesh.worker_effects import (
    AnnounceSuspect,
    GrantBlocks,
    ObserveHandoff,
    PullBlocks,
    RevokeGrant,
    SealBlocks,
    SendControl,
    SendNotices,
    SendTokens,
    WorkerEffect,
)
from common.ports.broker import Message
from common.ports.step_engine import Ticket
from common.protocol.messages import (
    ControlMessage,
    Hello,
    Offer,
    ReadyBlock,
    RoleChange,
    Snapshot,
    decode_snapshot,
    encode,
)
from common.protocol.subjects import Names
from common.runtime.failpoints import Failpoints
from common.runtime.frame_sender import FrameSender
from common.runtime.message_refusals import MessageRefusals
from common.runtime.model_cards import publish_card
from common.runtime.peer_links import PeerLinks
from common.runtime.seal_queue import SealQueue
from common.runtime.step_meter import StepMeter
from common.runtime.step_watch import StepWatch
from common.runtime.token_log_writer import TokenLogWriter
from common.runtime.worker_inbox import WorkerInbox
from common.runtime.worker_parts import WorkerIdentity, WorkerWorld
from common.runtime.worker_snapshot import snapshot_of
from common.runtime.worker_watches import WorkerWatches
from common.values.errors import (
    BrokerUnavailable,
    PeerError,
    SegueError,
    SettingsError,
)
from common.values.ids import WorkerId
from common.values.step import StepPlan
from common.values.worker import WorkerSnapshot, WorkerState

TICK_S = 1.0
SNAPSHOT_LEAST_S = 0.02
SNAPSHOT_MOST_S = 0.5
PEERS_SETTLE_S = 0.6
PEERS_TIMEOUT_S = 15.0
PING_TIMEOUT_S = 1.0
PAGE_NAMES = 4096
"""Names of cached blocks that one snapshot carries: a quarter of a small broker's limit at most."""
ANNOUNCE_TIMEOUT_S = 1.0
logger = logging.getLogger(__name__)


class WorkerService:
    """`run` serves until `stop` is set, then drains, says farewell, and returns."""

    def __init__(
        self,
        identity: WorkerIdentity,
        world: WorkerWorld,
        core: WorkerCore,
        names: Names,
        failpoints: Failpoints | None = None,
    ) -> None:
        self._identity = identity
        self._world = world
        self._core = core
        self._failpoints = failpoints or Failpoints()
        self._names = names
        self.token_log = TokenLogWriter(world.store, names, identity.incarnation, core.token_log, self._failpoints)
        self._meter = StepMeter()
        self.refusals = MessageRefusals()
        self._step_watch = StepWatch(self._meter)
        self._state: WorkerState = "loading"
        self._sequence_number = 0
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._seals = SealQueue(world.region, self._failpoints, self._on_sealed)
        self._frames = FrameSender(identity, world, names)
        self._tasks: asyncio.TaskGroup
        self._links: PeerLinks
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._address: tuple[str, int] = ("", 0)
        self._watches = WorkerWatches(
            identity,
            world,
            core,
            names,
            self._meter,
            self.refusals,
            after_event=self._after_event,
            drop_silent_peers=self._drop_silent_peers,
            fail=self.fail,
        )
        self.on_handoff: Callable[[float], None] = lambda exposed_s: None

    @property
    def core(self) -> WorkerCore:
        return self._core

    @property
    def meter(self) -> StepMeter:
        return self._meter

    @property
    def ready(self) -> bool:
        return self._state == "ready"

    @property
    def alive(self) -> bool:
        """False while a step hangs: the process is as good as dead, though its event loop runs."""
        return not self._step_watch.hangs(self._now())

    @property
    def tiers(self) -> dict[str, str]:
        return self._links.tiers()

    async def run(self, stop: asyncio.Event, *, on_ready: Callable[[], None] | None = None) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                self._links = self._make_links(tasks)
                self._address = await self._links.listen()
                inbox = WorkerInbox(
                    self._identity,
                    self._world,
                    self._core,
                    self._names,
                    tasks,
                    self._after_event,
                    self.fail,
                    self._change_role,
                    self._failpoints,
                    self.refusals,
                )
                subscriptions = [
                    await self._world.broker.subscribe(self._names.all_snapshots, self._on_snapshot),
                    await self._world.broker.subscribe(self._names.worker_inbox(self._identity.worker), inbox.on_inbox),
                    await self._world.broker.subscribe(self._names.worker_replay(self._identity.worker), inbox.on_replay),
                    await self._world.broker.subscribe(self._names.all_gateway_beats, self._watches.on_gateway_beat),
                ]
                await publish_card(self._world.store, self._names, self._identity.card)
                loops = [tasks.create_task(loop(), name=loop.__name__) for loop in self._loops()]
                await self._links.wait_until_tried(settle_s=PEERS_SETTLE_S, timeout_s=PEERS_TIMEOUT_S)
                if self._broken.done():
                    self._broken.result()
                self._enter("ready")
                if on_ready is not None:
                    on_ready()
                await self._until(stop)
                await self._drain()
                await self.token_log.flush()
                for loop_task in loops:
                    loop_task.cancel()
                self._publish_snapshot(gone=True)
                for subscription in subscriptions:
                    await subscription.close()
                await self._links.close()
        finally:
            self._seals.close()

    def _loops(self) -> tuple[Callable[[], Coroutine[None, None, None]], ...]:
        return (self._run_steps, self._seals.run, self._run_snapshots, *self._watches.loops(), self.token_log.run)

    # ------------------------------------------------------------------ events from outside

    def _on_snapshot(self, message: Message) -> None:
        try:
            heard = decode_snapshot(message.payload)
        except PeerError as error:
            self.refusals.note("snapshot", error)
            return
        snapshot = heard.snapshot
        if snapshot.worker == self._identity.worker:
            if snapshot.incarnation != self._identity.incarnation and not heard.gone and self._state == "loading":
                taken = f"the worker id {snapshot.worker} is taken by a running worker: choose another --worker-id"
                self.fail(SettingsError(taken))
        elif snapshot.model == self._identity.model:
            self._links.announced(snapshot, gone=heard.gone)
            self._core.on_peer_snapshot(heard, self._now())
            self._after_event(changed=False)

    def _drop_silent_peers(self, now: float, after_s: float) -> None:
        self._links.drop_silent(now, after_s)

    def _on_joined(self, peer: WorkerId) -> None:
        self._core.on_peer_joined(peer)
        self._after_event()

    def _on_control(self, peer: WorkerId, message: ControlMessage) -> None:
        self._failpoints.control(message, "received")
        self._core.on_control(peer, message, self._now())
        self._after_event()

    def _on_lost(self, peer: WorkerId) -> None:
        self._core.on_peer_lost(peer, self._now())
        self._after_event()

    def _change_role(self, change: RoleChange) -> None:
        if self._core.change_role(change, self._now()):
            logger.info("role_changed", extra={"fields": {"role": change.role, "decision": change.decision}})
            self._after_event()

    def fail(self, error: SegueError) -> None:
        """Stop the worker loudly: `run` raises."""
        if not self._broken.done():
            self._broken.set_exception(error)

    async def _until(self, stop: asyncio.Event) -> None:
        waiting = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait((waiting, self._broken), return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if self._broken.done():
            self._broken.result()

    # ------------------------------------------------------------------ loops

    async def _run_steps(self) -> None:
        """Steps are submitted as soon as the core plans them, also while one is under way; results come in order."""
        under_way: deque[tuple[StepPlan, Ticket]] = deque()
        while True:
            while (plan := self._core.plan(self._now())) is not None:
                self._failpoints.step(plan)
                under_way.append((plan, self._world.step_engine.submit(plan)))
            self._perform_effects()
            if not under_way:
                self._wake.clear()
                await self._wake.wait()
                continue
            plan, ticket = under_way.popleft()
            self._step_watch.began(plan, self._now())
            result = await self._world.step_engine.result(ticket)
            self._step_watch.ended()
            self._meter.observe(plan, result)
            self._core.on_step(result, self._now())
            self._after_event()
            if self._failpoints.is_armed("preempted"):
                self._failpoints.preempted(self._core.load().preemptions)

    def _on_sealed(self, effect: SealBlocks, blocks: list[ReadyBlock]) -> None:
        self._core.on_sealed(effect.ticket, blocks, self._now())
        self._after_event()

    async def _pull(self, effect: PullBlocks) -> None:
        self._failpoints.hit("pull.started")
        outcomes = await self._links.pull(effect.peer, effect.reservation, effect.blocks)
        self._failpoints.hit("pull.done")
        self._core.on_pulled(effect.ticket, outcomes, self._now())
        self._after_event()

    async def _announce(self, effect: AnnounceSuspect) -> None:
        """The gateway hears of a suspect before it runs: the broker answers a ping once it has what was published before."""
        self._frames.send_notices(effect.gateway, (effect.notice,))
        if not await self._world.broker.ping(timeout_s=ANNOUNCE_TIMEOUT_S):
            logger.warning("announcement_unconfirmed", extra={"fields": {"gateway": effect.gateway}})
        self._core.on_announced(effect.ticket)
        self._after_event()

    async def _run_snapshots(self) -> None:
        """On change at once, but not more often than every 20 ms; else every half second."""
        while True:
            self._changed.clear()
            self._publish_snapshot()
            if self._core.prefix_log.pending:
                self._changed.set()
            await asyncio.sleep(SNAPSHOT_LEAST_S)
            try:
                async with asyncio.timeout(SNAPSHOT_MOST_S):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def _drain(self) -> None:
        """No new work; what runs may end within the deadline."""
        self._enter("draining")
        self._publish_snapshot()
        self._core.drain(self._now())
        self._after_event()
        try:
            async with asyncio.timeout(self._identity.drain_s):
                while not self._core.idle:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            logger.warning("drain_cut_short", extra={"fields": {"after_s": self._identity.drain_s}})

    # ------------------------------------------------------------------ effects

    def _perform_effects(self) -> None:
        for effect in self._core.take_effects():
            self._perform(effect)

    def _after_event(self, *, changed: bool = True) -> None:
        self._perform_effects()
        self._wake.set()
        if changed:
            self._watches.changed()
            self._changed.set()

    def _perform(self, effect: WorkerEffect) -> None:
        match effect:
            case SendTokens():
                self._frames.send_tokens(effect.gateway, effect.entries)
                self.token_log.mark(effect.entries)
                self._failpoints.hit("tokens.sent")
                if any(entry.new.first == 0 for entry in effect.entries):
                    self._failpoints.hit("first_token.sent")
                if any(entry.new.ending is not None for entry in effect.entries):
                    self._failpoints.hit("end.sent")
            case SendNotices():
                self._frames.send_notices(effect.gateway, effect.notices)
            case AnnounceSuspect():
                self._tasks.create_task(self._announce(effect), name="announce")
            case SendControl():
                self._links.send(effect.peer, effect.message)
                if isinstance(effect.message, Offer):
                    self._watches.offered()
                self._failpoints.control(effect.message, "sent")
            case SealBlocks():
                self._seals.put(effect)
            case PullBlocks():
                self._tasks.create_task(self._pull(effect), name="pull")
            case GrantBlocks():
                self._world.transport.grant(effect.reservation, effect.blocks)
            case RevokeGrant():
                self._world.transport.revoke(effect.reservation)
            case ObserveHandoff():
                self.on_handoff(effect.exposed_s)

    def _publish_snapshot(self, *, gone: bool = False) -> None:
        names = min(PAGE_NAMES, self._world.broker.max_payload_bytes // 64)
        cache = None if gone else self._core.prefix_log.take(names)
        message = Snapshot(snapshot=self.snapshot(), gone=gone, cache=cache)
        try:
            self._world.broker.publish(self._names.snapshot(self._identity.worker), encode(message))
        except BrokerUnavailable as error:
            logger.warning("snapshot_lost", extra={"fields": {"reason": str(error)}})

    def snapshot(self) -> WorkerSnapshot:
        self._sequence_number += 1
        return snapshot_of(
            self._identity,
            self._core,
            self._meter,
            self._links,
            state=self._state,
            number=self._sequence_number,
            address=self._address,
            now=self._now(),
        )

    def _enter(self, state: WorkerState) -> None:
        self._state = state
        self._changed.set()
        fields = {"worker": self._identity.worker, "state": state, "role": self._core.role}
        logger.info("worker_state", extra={"fields": fields})

    def _make_links(self, tasks: asyncio.TaskGroup) -> PeerLinks:
        identity = self._identity
        hello = Hello(
            worker=identity.worker,
            incarnation=identity.incarnation,
            model=identity.model,
            fingerprint=identity.fingerprint,
            transport=self._world.transport.offer(),
        )
        return PeerLinks(
            hello=hello,
            network=self._world.network,
            transport=self._world.transport,
            tasks=tasks,
            strict_kernels=identity.strict_kernels,
            refusals=self.refusals,
            on_joined=self._on_joined,
            on_message=self._on_control,
            on_lost=self._on_lost,
        )

    def _now(self) -> float:
        return time.monotonic()
