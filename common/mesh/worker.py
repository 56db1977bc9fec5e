"""A worker as a pure machine: dispatches and cancels in, tokens out, KV handed to and taken from its peers.

Events are method calls that take `now`; what is to be done is collected as effects, which the shell takes and performs.
The sequence engine decides what is computed, the hand-off desk runs the transfers; this class owns what both need:
attempts, logs, and the frames that leave.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from common.mesh.departure import Departure
from common.mesh.engine_values import BlocksFilled, EngineEvent, EngineLoad, EnginePace, Preempted, TokensMade
from common.mesh.evacuation import Evacuation
from common.mesh.handoff_desk import HandoffDesk, Leases
from common.mesh.intake import Intake, WorkerLimits
from common.mesh.offer_patience import OfferPatience
from common.mesh.placing import Placing, owner_of
from common.mesh.replays import Replays
from common.mesh.sequence_engine import SequenceEngine
from common.mesh.suspects import Suspects
from common.mesh.worker_effects import SendTokens, WorkerEffect
from common.mesh.worker_ledger import WorkerCounters, WorkerLedger, frame_entry
from common.mesh.worker_registry import WorkerRegistry
from common.policy.prefix_log import PrefixLog
from common.policy.step_time import StepTime
from common.policy.transfer_time import TransferTime
from common.protocol.messages import (
    Accept,
    Ack,
    Busy,
    Cancel,
    ControlMessage,
    Dispatch,
    DispatchReply,
    ForwardedCancel,
    FrameEntry,
    Held,
    Hello,
    Last,
    Offer,
    Ready,
    ReadyBlock,
    Refuse,
    ReplayEntry,
    ReplayItem,
    RoleChange,
    Snapshot,
    Withdraw,
    unpack_ids,
)
from common.protocol.token_log import SequenceLog
from common.values.errors import PeerError
from common.values.ids import GatewayId, Incarnation, Owner, RequestId, ReservationId, SequenceKey, WorkerId
from common.values.step import StepPlan, StepResult
from common.values.transfer import PullOutcome
from common.values.worker import Role


class WorkerCore:
    """`make_reservation` draws a fresh random id: identity is made by the caller."""

    def __init__(
        self,
        *,
        worker: WorkerId,
        engine: SequenceEngine,
        block_size: int,
        limits: WorkerLimits,
        make_reservation: Callable[[], ReservationId],
        role: Role = "both",
    ) -> None:
        self.worker = worker
        self.role = role
        self.role_decision = 0
        self._engine = engine
        self._intake = Intake(limits, engine)
        self._effects: list[WorkerEffect] = []
        self._others = WorkerRegistry()
        self.evacuation = Evacuation(worker, self._others)
        self.desk = HandoffDesk(
            engine=engine,
            block_size=block_size,
            patience=OfferPatience(self._others, room_s=limits.offer_patience_s),
            make_reservation=make_reservation,
            effects=self._effects,
        )
        self._ledger = WorkerLedger(self.desk, self._effects)
        self._placing = Placing(worker, engine, self._intake, self._ledger, self.desk, self.evacuation)
        self._replays = Replays(self._ledger.logs, engine)
        self._departure = Departure(engine, self._ledger, self.desk, self.evacuation)
        self.suspects = Suspects(engine, self._effects)

    # ------------------------------------------------------------------ the shell's side

    def take_effects(self) -> list[WorkerEffect]:
        effects = list(self._effects)
        self._effects.clear()
        return effects

    def plan(self, now: float) -> StepPlan | None:
        """The next step, if any; there may be effects either way."""
        plan = self._engine.plan(now) if self._engine.may_plan else None
        self.suspects.serve(self._ledger.sequences)
        return plan

    def on_announced(self, ticket: int) -> None:
        """The answer to AnnounceSuspect."""
        self.suspects.on_announced(ticket, self._ledger.sequences)

    @property
    def counters(self) -> WorkerCounters:
        return self._ledger.counters

    def start_from(self, time: StepTime) -> None:
        """What steps take here, before any was served."""
        self._engine.start_from(time)

    def load(self) -> EngineLoad:
        return self._engine.load()

    def pace(self, now: float) -> EnginePace:
        return self._engine.pace(now)

    @property
    def step_time(self) -> StepTime | None:
        """None before anything is known of it."""
        return self._engine.step_time if self._engine.knows_its_speed else None

    @property
    def steps_refused(self) -> int:
        return self._engine.steps_refused

    @property
    def transfer_time(self) -> TransferTime:
        return self._ledger.transfers.current

    @property
    def prefix_log(self) -> PrefixLog:
        """What the mesh is told of the prefixes held here."""
        return self._engine.prefix_log

    def drain(self, now: float) -> None:
        """Take no new work; what runs goes to other workers, or ends here where there are none."""
        self.evacuation.leaving = True
        for sequence in [s for s in self._ledger.sequences.values() if s.receiver is not None]:
            self._ledger.settle(self.desk.receiving.turn_away(sequence), now)
        self._go_on(now)

    def change_role(self, change: RoleChange, now: float) -> bool:
        """Take a role while serving. False for a decision that is not newer than the one that was taken last."""
        if change.decision <= self.role_decision:
            return False
        self.role, self.role_decision = change.role, change.decision
        self._departure.displace(change.role)
        self._go_on(now)
        return True

    @property
    def changing(self) -> bool:
        """What belongs to a former role is still here."""
        return self._departure.under_way

    def leases(self) -> Leases:
        return self.desk.leases(self._ledger.all())

    @property
    def idle(self) -> bool:
        return not self._ledger.sequences and self._engine.idle

    # ------------------------------------------------------------------ gateway events

    def on_dispatch(self, dispatch: Dispatch, now: float) -> DispatchReply:
        """`dispatch.prompt` is present: the shell has read it from the record where it was too large to send."""
        prompt = unpack_ids(dispatch.prompt or b"")
        verdict, code, message = self._placing.judge(dispatch, prompt)
        self.counters.dispatched[verdict] += 1
        keys = [SequenceKey(RequestId(dispatch.request_id), state.choice) for state in dispatch.choices]
        if verdict == "accepted":
            leader: SequenceKey | None = None
            for key, state in zip(keys, dispatch.choices, strict=True):
                known = self._ledger.logs.get(key)
                if known is not None and known.attempt == dispatch.attempt:
                    known.take_owner(owner_of(dispatch))
                    continue
                self._placing.place(key, state, dispatch, prompt, leader, now)
                leader = leader if leader is not None or state.tokens else key
        return DispatchReply(request_id=dispatch.request_id, attempt=dispatch.attempt, verdict=verdict, code=code, message=message)

    def on_cancel(self, cancel: Cancel, now: float) -> None:
        request = RequestId(cancel.request_id)
        if any(log.owner.epoch > cancel.epoch for _, log in self._ledger.logs.of_request(request)):
            self.counters.stale_cancels += 1
            return
        self._ledger.floors.cancel(request, cancel.attempt, cancel.choices, now)
        for key, log in self._ledger.logs.of_request(request):
            if log.attempt > cancel.attempt or (cancel.choices is not None and key.choice not in cancel.choices):
                continue
            sequence = self._ledger.sequences.get(key)
            if sequence is not None:
                self._ledger.give_up(sequence, now)
                self.counters.ended["cancelled"] += 1
            elif log.state == "moved" and log.moved_to is not None:
                message = ForwardedCancel(request_id=request, choice=key.choice, attempt=cancel.attempt, epoch=cancel.epoch)
                self.desk.post.send(log.moved_to, message)
                self._ledger.forget(key, now)
        self._go_on(now)

    def on_replay(self, items: Iterable[ReplayItem], gateway: str = "", incarnation: str = "") -> list[ReplayEntry]:
        """Missing tokens and the state of each sequence asked for; this is also the gateway's probe, and its adoption."""
        return [self._replays.answer(item, Owner(GatewayId(gateway), Incarnation(incarnation), item.epoch)) for item in items]

    def owners(self) -> set[Owner]:
        """The gateways that what is queued or runs here is for."""
        return {sequence.log.owner for sequence in self._ledger.sequences.values()}

    def on_owner_lost(self, owner: Owner, now: float) -> None:
        """A gateway fell silent for good and nobody has taken its requests over: they end here."""
        for sequence in [s for s in self._ledger.sequences.values() if s.log.owner == owner]:
            if sequence.key in self._ledger.sequences:
                self._ledger.give_up(sequence, now)
                self.counters.ended["owner_lost"] += 1
        self._go_on(now)

    def token_log(self, key: SequenceKey) -> SequenceLog | None:
        """What was emitted of a sequence; None where it was cancelled or is long over."""
        return self._ledger.logs.get(key)

    # ------------------------------------------------------------------ engine events

    def on_step(self, result: StepResult, now: float) -> None:
        frames: dict[GatewayId, list[FrameEntry]] = {}
        for event in self._engine.complete(result, now):
            self._on_engine_event(event, frames, now)
        tokens = [SendTokens(gateway=gateway, entries=tuple(entries)) for gateway, entries in frames.items()]
        self._effects[:0] = tokens  # the client's tokens leave before anything else that this step brought about
        self._go_on(now)

    def on_sealed(self, ticket: int, blocks: Sequence[ReadyBlock], now: float) -> None:
        self._ledger.settle(self.desk.sending.sealed(ticket, blocks, now), now)
        self._go_on(now)

    # ------------------------------------------------------------------ peer events

    def on_peer_joined(self, peer: WorkerId) -> None:
        """A control connection is up and the two can pair."""
        self.desk.post.joined(peer)

    def on_peer_lost(self, peer: WorkerId, now: float) -> None:
        """What was to be decoded there is decoded here, with care: it or a sibling may be what took the peer down."""
        settled = self.desk.peer_lost(peer, self._ledger.all())
        for sequence, settlement in settled:
            if settlement == "kept" and not self.evacuation.announced_leave(peer):
                sequence.suspect = True
                self._engine.make_suspect(sequence.key)
        self._ledger.settle(settled, now)
        self.desk.receiving.serve_queue()

    def on_control(self, peer: WorkerId, message: ControlMessage, now: float) -> None:
        self._others.heard(peer, now)
        self.desk.post.count_handled(peer)
        match message:
            case Hello():
                raise PeerError("a second hello on one connection")
            case Held():
                self._ledger.settle(self.desk.held(peer, message, self._ledger.all()), now)
            case Offer():
                self._placing.take_offer(peer, message, now)
            case Ready() | Last() | Withdraw():
                sequence = self._ledger.sequence_of(message.request_id, message.choice, message.attempt)
                if isinstance(message, Last) and sequence is not None and sequence.receiver is not None:
                    job = sequence.job
                    self._intake.check_last(message, len(job.prompt), job.given, job.sampling)
                self._ledger.settle(self.desk.receiving.sender_message(peer, message, sequence, now), now)
            case Accept() | Busy() | Refuse() | Ack():
                sequence = self._ledger.sequence_of(message.request_id, message.choice, message.attempt)
                if sequence is not None and sequence.peer == peer:
                    self._ledger.settle(self.desk.sending.receiver_message(sequence, message, now), now)
                    if sequence.leaves and isinstance(message, Busy):
                        self._ledger.settle(self.desk.sending.take_back(sequence), now)  # its stream waits: try another one
            case ForwardedCancel():
                cancel = Cancel(request_id=message.request_id, attempt=message.attempt, choices=[message.choice], epoch=message.epoch)
                self.on_cancel(cancel, now)
        self._go_on(now)

    def on_peer_snapshot(self, message: Snapshot, now: float) -> None:
        """Another worker of the group was heard."""
        self.evacuation.on_snapshot(message, now)
        self._departure.go_on(now)

    def on_pulled(self, ticket: int, outcomes: Sequence[PullOutcome], now: float) -> None:
        self._ledger.settle(self.desk.receiving.pulled(ticket, outcomes, now), now)
        self._go_on(now)

    def on_tick(self, now: float) -> None:
        """Once a second or so: expire, list what is held with each peer."""
        self._ledger.floors.expire(now)
        self._ledger.logs.expire(now)
        self.evacuation.on_tick(now)
        self._ledger.end_overdue(now)
        self.desk.tick(self._ledger.all())
        self.end_patience(now)

    def patience_ends_at(self) -> float | None:
        """When `end_patience` is due; None while no offer waits. An offer that is made may bring it forward."""
        return self.desk.sending.patience_ends_at(self._ledger.sequences.values())

    def end_patience(self, now: float) -> None:
        """Decode here what peers had no room for, or did not answer."""
        self._ledger.settle(self.desk.sending.end_patience(now, self._ledger.all()), now)
        self._go_on(now)

    def check_invariants(self) -> None:
        self._engine.check_invariants()
        self.desk.check_invariants()
        self.suspects.check_invariants()
        for sequence in self._ledger.sequences.values():
            if sequence.sender is not None:
                sequence.sender.check_invariants()
            if sequence.receiver is not None:
                sequence.receiver.check_invariants()

    # ------------------------------------------------------------------ private

    def _on_engine_event(self, event: EngineEvent, frames: dict[GatewayId, list[FrameEntry]], now: float) -> None:
        sequence = self._ledger.sequences.get(event.key)
        if sequence is None:
            return  # handed back with a sibling, by an earlier event of the same step
        match event:
            case TokensMade(new=new, stages=stages):
                sequence.log.append(new)
                self.counters.tokens += len(new.tokens)
                self.suspects.token_made(sequence)
                sequence.suspect = sequence.suspect and sequence.peer is not None
                frames.setdefault(sequence.log.owner.gateway, []).append(frame_entry(sequence, new, stages))
                if new.ending is not None:
                    self._ledger.end(sequence, new.ending.reason, now)
                else:
                    sequence.log.state = "running"
                    sequence.last_token_at = now
                    self._ledger.settle(self.desk.sending.token_made(sequence, now), now)
            case BlocksFilled() if sequence.peer is None:
                pass  # a sibling stays here, by an earlier event of the same step
            case BlocksFilled():
                leader = self._ledger.sequences.get(sequence.leader) if sequence.leader is not None else None
                later = leader is not None and leader.peer is not None
                if sequence.leaves:  # its tokens so far are its prompt's part; they are known once it stands still
                    later = not event.complete
                    sequence.job = replace(sequence.job, given=tuple(sequence.log.tokens[:-1]))
                self._ledger.settle(self.desk.sending.filled(sequence, event, now, later=later), now)
            case Preempted():
                sequence.log.state = "preempted"
                self.suspects.preempted(sequence)

    def _go_on(self, now: float) -> None:
        """What every event may have made possible."""
        self.desk.receiving.serve_queue()
        self._departure.go_on(now)
