"""A worker of the simulated mesh: the real core and sequence engine in a process that can freeze, die and start again.

It does what the worker's shell does, in virtual time: steps, seals and copies take their time, snapshots are sent on change,
ticks come every second. Tokens come from the shadow engine, which sees every wrong block.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Protocol

from common.mesh.intake import WorkerLimits
from common.mesh.owner_watch import OwnerWatch
from common.mesh.sequence_engine import SequenceEngine
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
from common.policy.batching import StepLimits
from common.policy.block_pool import BlockPool
from common.protocol.messages import (
    Cancel,
    Dispatch,
    DispatchReply,
    Offer,
    ReadyBlock,
    ReplayEntry,
    ReplayItem,
    RoleChange,
    SequenceNotice,
    Snapshot,
    TokenFrame,
)
from common.protocol.request_record import RUNNING_TTL_S
from common.protocol.token_log_backlog import LogPart, TokenLogBacklog
from common.simulation.emission_ledger import EmissionLedger
from common.simulation.owner_laws import OwnerLaws
from common.simulation.schedule import Action
from common.simulation.shadow_kv import EOS, VOCABULARY, ShadowKv, ShadowStep
from common.simulation.simulated_connections import Connection, SimulatedConnections
from common.simulation.simulated_copies import SimulatedPull, check_landing
from common.simulation.simulated_peers import SimulatedPeers
from common.simulation.simulated_process import SimulatedProcess
from common.simulation.simulated_store import SimulatedStore
from common.simulation.surroundings import Surroundings
from common.simulation.virtual_coroutine import drive
from common.simulation.worker_shape import BLOCK, FINGERPRINT, MODEL, NAMES, WorkerShape
from common.values.errors import InvariantBroken
from common.values.ids import GatewayId, Incarnation, ReservationId, WorkerId
from common.values.transfer import PullOutcome
from common.values.worker import Role, WorkerSnapshot, WorkerState

TICK_S = 1.0
SNAPSHOT_MOST_S = 0.5
SETTLE_S = 0.6
DRAIN_S = 10.0
PAGE_NAMES = 8
ANNOUNCE_TIMEOUT_S = 1.0
LOG_INTERVAL_S = 0.1
LOG_RETRY_S = 1.0
LEAST_TIMER_S = 0.001


class WorkersWorld(Protocol):
    """What a worker needs of the mesh around it: who is there, and ways to reach them."""

    @property
    def around(self) -> Surroundings: ...
    @property
    def network(self) -> SimulatedConnections: ...
    @property
    def ledger(self) -> EmissionLedger: ...
    @property
    def store(self) -> SimulatedStore: ...
    @property
    def lost_gateways(self) -> Mapping[Incarnation, float]: ...
    @property
    def workers(self) -> dict[WorkerId, "SimulatedWorker"]: ...
    def publish_frame(self, worker: "SimulatedWorker", gateway: GatewayId, frame: TokenFrame) -> None: ...
    def announce(self, worker: "SimulatedWorker", snapshot: Snapshot) -> None: ...
    def broker_answers(self, worker: "SimulatedWorker") -> bool: ...


class SimulatedWorker:
    def __init__(self, worker: WorkerId, shape: WorkerShape, world: WorkersWorld) -> None:
        self.worker = worker
        self.shape = shape
        self.process = SimulatedProcess(worker, world.around)
        self._world = world
        self._around = world.around
        world.network.add(worker, self)
        self._begin("ready")

    # ------------------------------------------------------------------ lives

    def _begin(self, state: WorkerState) -> None:
        shape = self.shape
        self.kv = ShadowKv(shape.blocks, BLOCK)
        self.pool = BlockPool(shape.blocks, self.kv.generations)
        self.engine = SequenceEngine(
            fingerprint=FINGERPRINT,
            pool=self.pool,
            limits=StepLimits(max_tokens=shape.budget, max_sequences=shape.sequences),
            max_model_len=shape.max_model_len,
            eos_token_ids=EOS,
            max_waiting=shape.waiting,
        )
        self.core = WorkerCore(
            worker=self.worker,
            engine=self.engine,
            block_size=BLOCK,
            limits=WorkerLimits(max_model_len=shape.max_model_len, vocab_size=VOCABULARY, offer_patience_s=2.0),
            make_reservation=lambda: ReservationId(self._around.random.randbytes(16)),
            role=shape.role,
        )
        self.peers = SimulatedPeers(self.worker, self.process, self._world.network, self.core, self._identity_of, self._after_event)
        self.grants: dict[ReservationId, dict[int, int]] = {}
        self.pulls: list[SimulatedPull] = []
        self._step = ShadowStep(self.kv)
        self._stepping = False
        self.hangs = False
        self._seals: deque[SealBlocks] = deque()
        self._state: WorkerState = state
        self._numbers = 0
        self._snapshot_due = False
        self._patience_due = math.inf
        self._backlog = TokenLogBacklog(self.incarnation, self.core.token_log)
        self._store = self._world.store.client(self.process)
        self._log_due = False
        self._owners = OwnerWatch()
        self._owner_laws = OwnerLaws(self.worker, self.core)
        self._watched_at = self._around.now
        self._say_snapshot()
        self.process.after(TICK_S * self._around.random.random(), "tick", self._tick)
        if state == "loading":
            self.process.after(SETTLE_S, "timer", self._become_ready)

    def _become_ready(self) -> None:
        self._state = "ready"
        self._say_snapshot()

    def _identity_of(self, worker: WorkerId) -> tuple[Incarnation, ShadowKv]:
        other = self._world.workers[worker]
        return other.incarnation, other.kv

    @property
    def incarnation(self) -> Incarnation:
        return Incarnation(f"{self.worker}.{self.process.life}")

    def die(self) -> None:
        """SIGKILL: connections end at once, and so do copies that the process served."""
        self.process.die()
        for connection in self._world.network.of(self.worker):
            self._world.network.end(connection, by=self.worker)
        for other in self._world.workers.values():
            for pull in other.pulls:
                if pull.source is self and not pull.mapped:
                    pull.process.after(0.001, "copy", pull.give_up)

    def start_again(self) -> None:
        self.process.start_again()
        self._begin("loading")

    def drain(self, gone: Action) -> None:
        """SIGTERM: no new work, then a farewell, whatever runs at the deadline; `gone` once the process has ended."""
        self._state = "draining"
        self._say_snapshot()
        self.core.drain(self._around.now)
        self._after_event()
        self._go_when_idle(self._around.now + DRAIN_S, gone)

    def change_role(self, role: Role, decision: int) -> None:
        self.core.change_role(RoleChange(role=role, decision=decision), self._around.now)
        self._after_event()

    def _go_when_idle(self, deadline: float, gone: Action) -> None:
        if not self.core.idle and self._around.now < deadline:
            self.process.after(0.02, "timer", partial(self._go_when_idle, deadline, gone))
            return
        self._around.counts["drained" if self.core.idle else "drain_cut_short"] += 1
        self._world.announce(self, Snapshot(snapshot=self._snapshot(), gone=True))
        self.die()
        gone()

    # ------------------------------------------------------------------ what arrives

    def on_dispatch(self, dispatch: Dispatch) -> DispatchReply:
        reply = self.core.on_dispatch(dispatch, self._around.now)
        self._around.counts[f"dispatch_{reply.verdict}"] += 1
        self._after_event()
        return reply

    def on_replay(self, items: Iterable[ReplayItem], gateway: str, incarnation: str) -> tuple[Incarnation, list[ReplayEntry]]:
        """The answer says which incarnation gave it."""
        asked = list(items)
        answer = self.core.on_replay(asked, gateway, incarnation)
        self._owner_laws.asked(asked, answer, GatewayId(gateway))
        return self.incarnation, answer

    def on_tell_cache(self) -> None:
        self.core.prefix_log.restart()
        self._after_event()

    def on_gateway_beat(self, gateway: GatewayId, incarnation: Incarnation) -> None:
        self._owners.beat(gateway, incarnation, self._around.now)

    def on_cancel(self, cancel: Cancel) -> None:
        if self._owner_laws.cancel_counts(cancel):
            self._world.ledger.cancelled(self.worker, self.process.life, cancel)
            self.core.on_cancel(cancel, self._around.now)
        else:
            self._around.counts["old_owners_cancel"] += 1
            with self._owner_laws.nothing_ends(cancel):
                self.core.on_cancel(cancel, self._around.now)
        self._after_event()

    def on_snapshot(self, snapshot: Snapshot) -> None:
        if not snapshot.gone:
            self.peers.announced(snapshot.snapshot)
        self.core.on_peer_snapshot(snapshot, self._around.now)
        self._after_event(changed=False)

    def on_connected(self, connection: Connection) -> None:
        self.peers.on_connected(connection)

    def on_payload(self, connection: Connection, payload: bytes) -> None:
        self.peers.on_payload(connection, payload)

    def on_connection_end(self, connection: Connection) -> None:
        self.peers.on_connection_end(connection)

    # ------------------------------------------------------------------ loops

    def _tick(self) -> None:
        self.process.after(TICK_S, "tick", self._tick)
        self.core.on_tick(self._around.now)
        self.peers.drop_silent()
        self.core.check_invariants()
        self._after_event(changed=False)
        self._watch_owners()

    def _watch_offers(self) -> None:
        """Offers that a silent or crowded peer leaves waiting are taken back at their time."""
        due = self.core.patience_ends_at()
        if due is not None and due < self._patience_due:
            self._patience_due = due
            self.process.after(max(LEAST_TIMER_S, due - self._around.now), "timer", partial(self._end_patience, due))

    def _end_patience(self, due: float) -> None:
        if due != self._patience_due:
            return
        self._patience_due = math.inf
        self.core.end_patience(self._around.now)
        self._after_event()
        self._watch_offers()

    def _watch_owners(self) -> None:
        """Silence of gateways counts only while our broker answers, and we were awake."""
        now = self._around.now
        late, self._watched_at = now - self._watched_at > 2 * TICK_S, now
        if late or not self._world.broker_answers(self):
            self._owners.refresh(now)
            self._owner_laws.undisturbed_since = now
            return
        for owner in self._owners.lost(self.core.owners(), now):
            self._around.counts["owner_lost"] += 1
            self.core.on_owner_lost(owner, now)
            self._after_event()
        self._owner_laws.check_lost(self._world.lost_gateways, now)

    def _say_snapshot(self) -> None:
        self._world.announce(self, Snapshot(snapshot=self._snapshot(), cache=self.core.prefix_log.take(PAGE_NAMES)))
        self.process.after(SNAPSHOT_MOST_S, "snapshot", partial(self._say_if_quiet, self._numbers))

    def _say_if_quiet(self, number: int) -> None:
        if self._numbers == number:
            self._say_snapshot()

    def _say_soon(self) -> None:
        self._snapshot_due = False
        self._say_snapshot()

    def _run_steps(self) -> None:
        """Steps run one after another; the next may be planned while one is under way."""
        while (plan := self.core.plan(self._around.now)) is not None:
            self._around.counts["steps"] += 1
            self._step.submit(plan)
        if self._step.busy and not self._stepping:
            self._stepping = True
            self.process.after(self._around.takes(self._around.strength.step_s), "step", self._end_step)

    def hang(self) -> None:
        """The engine's thread never comes back from its step."""
        self._around.note(self.worker, "hangs")
        self.hangs = True

    def _end_step(self) -> None:
        if self.hangs:
            return
        self._stepping = False
        self.core.on_step(self._step.perform(), self._around.now)
        self.core.check_invariants()
        self._after_event()

    def _start_seal(self) -> None:
        if self._seals:
            self.process.after(self._around.takes(self._around.strength.seal_s), "seal", self._end_seal)

    def _end_seal(self) -> None:
        seal = self._seals.popleft()
        blocks = []
        for filled in seal.blocks:
            if self.kv.generations[filled.block] != filled.generation:
                raise InvariantBroken("a block was given away while it was sealed")
            checksum = self.kv.seal(filled.block, filled.valid)
            blocks.append(ReadyBlock(index=filled.index, block=filled.block, generation=filled.generation, checksum=checksum))
        self.core.on_sealed(seal.ticket, blocks, self._around.now)
        self._after_event()
        self._start_seal()

    # ------------------------------------------------------------------ effects

    def _after_event(self, *, changed: bool = True) -> None:
        self._perform_effects()
        self._run_steps()
        self._perform_effects()
        if changed and not self._snapshot_due:
            self._snapshot_due = True
            self.process.after(self._around.strength.snapshot_s, "snapshot", self._say_soon)

    def _perform_effects(self) -> None:
        for effect in self.core.take_effects():
            self._perform(effect)

    def _perform(self, effect: WorkerEffect) -> None:
        match effect:
            case SendTokens():
                self._owner_laws.emitted(effect.gateway, effect.entries)
                self._world.ledger.emitted(self.worker, self.process.life, self.core.token_log, effect.entries)
                self._backlog.mark(effect.entries)
                self._log_soon(LOG_INTERVAL_S)
                frame = TokenFrame(worker=self.worker, incarnation=self.incarnation, entries=list(effect.entries))
                self._world.publish_frame(self, effect.gateway, frame)
            case SendNotices():
                self._send_notice(effect.gateway, effect.notices)
            case AnnounceSuspect():
                self._send_notice(effect.gateway, (effect.notice,))
                answers = self._world.broker_answers(self)
                takes = self._around.takes(self._around.strength.message_delay_s) if answers else ANNOUNCE_TIMEOUT_S
                self.process.after(takes, "ping", partial(self._announced, effect.ticket))
            case SendControl():
                self.peers.send(effect.peer, effect.message)
                if isinstance(effect.message, Offer):
                    self._watch_offers()
            case SealBlocks():
                self._seals.append(effect)
                if len(self._seals) == 1:
                    self._start_seal()
            case PullBlocks():
                self._pull(effect)
            case GrantBlocks():
                self.grants.setdefault(effect.reservation, {}).update(effect.blocks)
            case RevokeGrant():
                self.grants.pop(effect.reservation, None)
            case ObserveHandoff():
                self._around.counts["handoffs"] += 1

    def _send_notice(self, gateway: GatewayId, notices: tuple[SequenceNotice, ...]) -> None:
        frame = TokenFrame(worker=self.worker, incarnation=self.incarnation, entries=[], notices=list(notices))
        self._world.publish_frame(self, gateway, frame)

    # ------------------------------------------------------------------ the token log

    def _log_soon(self, seconds: float) -> None:
        if not self._log_due:
            self._log_due = True
            self.process.after(seconds, "log", self._write_log)

    def _write_log(self) -> None:
        parts = self._backlog.take()
        lists = {NAMES.log_key(request): entries for request, entries in self._backlog.entries(parts).items()}
        if not lists:
            self._log_written(parts, {})
            return
        coroutine = self._store.append(lists, ttl_s=RUNNING_TTL_S)
        drive(coroutine, partial(self._log_written, parts), lambda error: self._log_failed(parts))

    def _log_written(self, parts: list[LogPart], lengths: Mapping[str, int]) -> None:
        self._around.counts["log_entries"] += len(parts)
        self._backlog.written(parts, {part.key.request_id: lengths[NAMES.log_key(part.key.request_id)] for part in parts})
        self._log_due = False
        if not self._backlog.is_empty:
            self._log_soon(LOG_INTERVAL_S)

    def _log_failed(self, parts: list[LogPart]) -> None:
        self._backlog.failed(parts)
        self._log_due = False
        self._log_soon(LOG_INTERVAL_S + LOG_RETRY_S)

    def _announced(self, ticket: int) -> None:
        self.core.on_announced(ticket)
        self._after_event()

    def _pull(self, effect: PullBlocks) -> None:
        link = self.peers.link(effect.peer)
        landing = {block.landing_block: self.kv.generations[block.landing_block] for block in effect.blocks}
        if link is None:
            outcomes: list[PullOutcome] = ["lost"] * len(effect.blocks)
            self.process.after(0.0, "copy", partial(self._pulled, None, effect, landing, outcomes))
            return
        connection, source_kv = link
        pull = SimulatedPull(
            around=self._around,
            process=self.process,
            effect=effect,
            kv=self.kv,
            source=self._world.workers[effect.peer],
            source_kv=source_kv,
            mapped=connection.tier == "shm",
            life=self.process.life,
            done=lambda outcomes: self._pulled(pull, effect, landing, outcomes),
        )
        self.pulls.append(pull)
        pull.start()

    def _pulled(
        self, pull: SimulatedPull | None, effect: PullBlocks, generations: dict[int, int], outcomes: list[PullOutcome]
    ) -> None:
        if pull is not None:
            self.pulls.remove(pull)
        check_landing(self.kv, effect, generations)
        self._around.note(self.worker, f"pulled {outcomes}")
        self.core.on_pulled(effect.ticket, outcomes, self._around.now)
        self._after_event()

    # ------------------------------------------------------------------ state

    @property
    def quiet(self) -> bool:
        """Nothing of any request is left to do here."""
        return self.process.awake and self.core.idle and not (self._seals or self.pulls or self._step.busy)

    def _snapshot(self) -> WorkerSnapshot:
        self._numbers += 1
        load, shape = self.core.load(), self.shape
        return WorkerSnapshot(
            worker=self.worker,
            incarnation=self.incarnation,
            model=MODEL,
            role=self.core.role,
            changing=self.core.changing,
            role_decision=self.core.role_decision,
            state=self._state,
            sequence_number=self._numbers,
            control_host="",
            control_port=0,
            fingerprint=FINGERPRINT,
            max_model_len=shape.max_model_len,
            max_num_seqs=shape.sequences,
            blocks_total=load.blocks_total,
            blocks_free=load.blocks_free,
            blocks_cached=load.blocks_cached,
            waiting=load.waiting + self.core.desk.receiving.offers_queued,
            running=load.running + load.held,
            queued_tokens=load.queued_tokens,
            seconds_per_step=self._around.strength.step_s,
            peers=self.peers.joined(),
        )
