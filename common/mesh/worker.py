"""A worker as a pure machine: dispatches and cancels in, tokens out, KV handed to and taken from its peers.

Events are method calls that take `now`; what is to be done is collected as effects, which the shell takes and performs.
The sequence engine decides what is computed, the hand-off desk runs the transfers; this class owns what both need:
attempts, logs, and the frames that leave.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from common.mesh.engine_values import BlocksFilled, EngineEvent, EngineLoad, Preempted, SequenceJob, TokensMade
from common.mesh.evacuation import Evacuation
from common.mesh.handoff_desk import HandoffDesk, Leases, Settled
from common.mesh.intake import Intake, WorkerLimits
from common.mesh.offer_patience import OfferPatience
from common.mesh.sequence import Phase
from common.mesh.sequence_engine import SequenceEngine
from common.mesh.suspects import Suspects, notice_of
from common.mesh.worker_effects import ObserveHandoff, SendNotices, SendTokens, WorkerEffect
from common.mesh.worker_registry import WorkerRegistry
from common.mesh.worker_sequence import WorkerSequence
from common.policy.prefix_log import PrefixLog
from common.protocol.attempt_floor import AttemptFloors
from common.protocol.handoff_receiver import Receiver, refuse
from common.protocol.messages import (
    Accept,
    Ack,
    Busy,
    Cancel,
    ChoiceState,
    ControlMessage,
    Dispatch,
    DispatchReply,
    DispatchVerdict,
    ForwardedCancel,
    FrameEntry,
    Held,
    Hello,
    Last,
    Offer,
    Ready,
    ReadyBlock,
    Refuse,
    RefuseReason,
    ReplayEntry,
    ReplayItem,
    SequenceNotice,
    SequenceState,
    Snapshot,
    Withdraw,
    unpack_ids,
)
from common.protocol.token_log import SequenceLog, TokenLogs
from common.values.errors import PeerError
from common.values.ids import GatewayId, Incarnation, Owner, RequestId, ReservationId, SequenceKey, WorkerId
from common.values.step import StepPlan, StepResult
from common.values.tokens import DEADLINE_CODE, Ending, NewTokens
from common.values.transfer import PullOutcome


@dataclass(slots=True)
class WorkerCounters:
    """Totals since the start; the shell shows them as metrics."""

    dispatched: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    stale_cancels: int = 0


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
    ) -> None:
        self.worker = worker
        self.counters = WorkerCounters()
        self._engine = engine
        self._intake = Intake(limits, engine)
        self._floors = AttemptFloors()
        self._logs = TokenLogs()
        self._sequences: dict[SequenceKey, WorkerSequence] = {}
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
        self.suspects = Suspects(engine, self._effects)

    # ------------------------------------------------------------------ the shell's side

    def take_effects(self) -> list[WorkerEffect]:
        effects = list(self._effects)
        self._effects.clear()
        return effects

    def plan(self) -> StepPlan | None:
        """The next step, if any; there may be effects either way."""
        plan = self._engine.plan() if self._engine.may_plan else None
        self.suspects.serve(self._sequences)
        return plan

    def on_announced(self, ticket: int) -> None:
        """The answer to AnnounceSuspect."""
        self.suspects.on_announced(ticket, self._sequences)

    def load(self) -> EngineLoad:
        return self._engine.load()

    @property
    def prefix_log(self) -> PrefixLog:
        """What the mesh is told of the prefixes held here."""
        return self._engine.prefix_log

    def drain(self, now: float) -> None:
        """Take no new work; what runs goes to other workers, or ends here where there are none."""
        self.evacuation.leaving = True
        for sequence in [s for s in self._sequences.values() if s.receiver is not None]:
            self._settle(self.desk.turn_away(sequence), now)
        self._go_on(now)

    def leases(self) -> Leases:
        return self.desk.leases(list(self._sequences.values()))

    @property
    def idle(self) -> bool:
        return not self._sequences and self._engine.idle

    # ------------------------------------------------------------------ gateway events

    def on_dispatch(self, dispatch: Dispatch, now: float) -> DispatchReply:
        """`dispatch.prompt` is present: the shell has read it from the record where it was too large to send."""
        prompt = unpack_ids(dispatch.prompt or b"")
        verdict, code, message = self._judge(dispatch, prompt)
        self.counters.dispatched[verdict] += 1
        keys = [SequenceKey(RequestId(dispatch.request_id), state.choice) for state in dispatch.choices]
        if verdict == "accepted":
            leader: SequenceKey | None = None
            for key, state in zip(keys, dispatch.choices, strict=True):
                known = self._logs.get(key)
                if known is not None and known.attempt == dispatch.attempt:
                    known.take_owner(_owner(dispatch))
                    continue
                self._place(key, state, dispatch, prompt, leader, now)
                leader = leader if leader is not None or state.tokens else key
        return DispatchReply(request_id=dispatch.request_id, attempt=dispatch.attempt, verdict=verdict, code=code, message=message)

    def on_cancel(self, cancel: Cancel, now: float) -> None:
        request = RequestId(cancel.request_id)
        if any(log.owner.epoch > cancel.epoch for _, log in self._logs.of_request(request)):
            self.counters.stale_cancels += 1
            return
        self._floors.cancel(request, cancel.attempt, cancel.choices, now)
        for key, log in self._logs.of_request(request):
            if log.attempt > cancel.attempt or (cancel.choices is not None and key.choice not in cancel.choices):
                continue
            sequence = self._sequences.get(key)
            if sequence is not None:
                self._give_up(sequence, now)
                self.counters.ended["cancelled"] += 1
            elif log.state == "moved" and log.moved_to is not None:
                message = ForwardedCancel(request_id=request, choice=key.choice, attempt=cancel.attempt, epoch=cancel.epoch)
                self.desk.send(log.moved_to, message)
                self._logs.forget(key)
        self._go_on(now)

    def on_replay(self, items: Iterable[ReplayItem], gateway: str = "", incarnation: str = "") -> list[ReplayEntry]:
        """Missing tokens and the state of each sequence asked for; this is also the gateway's probe, and its adoption."""
        return [self._replay(item, Owner(GatewayId(gateway), Incarnation(incarnation), item.epoch)) for item in items]

    def owners(self) -> set[Owner]:
        """The gateways that what is queued or runs here is for."""
        return {sequence.log.owner for sequence in self._sequences.values()}

    def on_owner_lost(self, owner: Owner, now: float) -> None:
        """A gateway fell silent for good and nobody has taken its requests over: they end here."""
        for sequence in [s for s in self._sequences.values() if s.log.owner == owner]:
            if sequence.key in self._sequences:
                self._give_up(sequence, now)
                self.counters.ended["owner_lost"] += 1
        self._go_on(now)

    def token_log(self, key: SequenceKey) -> SequenceLog | None:
        """What was emitted of a sequence; None where it was cancelled or is long over."""
        return self._logs.get(key)

    # ------------------------------------------------------------------ engine events

    def on_step(self, result: StepResult, now: float) -> None:
        frames: dict[GatewayId, list[FrameEntry]] = {}
        for event in self._engine.complete(result):
            self._on_engine_event(event, frames, now)
        tokens = [SendTokens(gateway=gateway, entries=tuple(entries)) for gateway, entries in frames.items()]
        self._effects[:0] = tokens  # the client's tokens leave before anything else that this step brought about
        self._go_on(now)

    def on_sealed(self, ticket: int, blocks: Sequence[ReadyBlock], now: float) -> None:
        self._settle(self.desk.sealed(ticket, blocks), now)
        self._go_on(now)

    # ------------------------------------------------------------------ peer events

    def on_peer_joined(self, peer: WorkerId) -> None:
        """A control connection is up and the two can pair."""
        self.desk.peer_joined(peer)

    def on_peer_lost(self, peer: WorkerId, now: float) -> None:
        """What was to be decoded there is decoded here, with care: it or a sibling may be what took the peer down."""
        settled = self.desk.peer_lost(peer, list(self._sequences.values()))
        for sequence, settlement in settled:
            if settlement == "kept" and not self.evacuation.announced_leave(peer):
                sequence.suspect = True
                self._engine.make_suspect(sequence.key)
        self._settle(settled, now)
        self.desk.serve_queue()

    def on_control(self, peer: WorkerId, message: ControlMessage, now: float) -> None:
        self._others.heard(peer, now)
        self.desk.count_handled(peer)
        match message:
            case Hello():
                raise PeerError("a second hello on one connection")
            case Held():
                self._settle(self.desk.held(peer, message, list(self._sequences.values())), now)
            case Offer():
                self._on_offer(peer, message, now)
            case Ready() | Last() | Withdraw():
                sequence = self._sequence_of(message.request_id, message.choice, message.attempt)
                if isinstance(message, Last) and sequence is not None and sequence.receiver is not None:
                    job = sequence.job
                    self._intake.check_last(message, len(job.prompt), job.given, job.sampling)
                self._settle(self.desk.sender_message(peer, message, sequence), now)
            case Accept() | Busy() | Refuse() | Ack():
                sequence = self._sequence_of(message.request_id, message.choice, message.attempt)
                if sequence is not None and sequence.peer == peer:
                    self._settle(self.desk.receiver_message(sequence, message), now)
                    if sequence.leaves and isinstance(message, Busy):
                        self._settle(self.desk.take_back(sequence), now)  # its stream waits: try another one
            case ForwardedCancel():
                cancel = Cancel(request_id=message.request_id, attempt=message.attempt, choices=[message.choice], epoch=message.epoch)
                self.on_cancel(cancel, now)
        self._go_on(now)

    def on_peer_snapshot(self, message: Snapshot, now: float) -> None:
        """Another worker of the group was heard."""
        self.evacuation.on_snapshot(message, now)
        self._evacuate(now)

    def on_pulled(self, ticket: int, outcomes: Sequence[PullOutcome], now: float) -> None:
        self._settle(self.desk.pulled(ticket, outcomes), now)
        self._go_on(now)

    def on_tick(self, now: float) -> None:
        """Once a second or so: expire, list what is held with each peer."""
        self._floors.expire(now)
        self._logs.expire(now)
        self.evacuation.on_tick(now)
        self._end_overdue(now)
        self.desk.tick(list(self._sequences.values()))
        self.end_patience(now)

    def patience_ends_at(self) -> float | None:
        """When `end_patience` is due; None while no offer waits. An offer that is made may bring it forward."""
        return self.desk.patience_ends_at(self._sequences.values())

    def end_patience(self, now: float) -> None:
        """Decode here what peers had no room for, or did not answer."""
        self._settle(self.desk.end_patience(now, list(self._sequences.values())), now)
        self._go_on(now)

    def check_invariants(self) -> None:
        self._engine.check_invariants()
        self.desk.check_invariants()
        self.suspects.check_invariants()
        for sequence in self._sequences.values():
            if sequence.sender is not None:
                sequence.sender.check_invariants()
            if sequence.receiver is not None:
                sequence.receiver.check_invariants()

    # ------------------------------------------------------------------ placing

    def _judge(self, dispatch: Dispatch, prompt: tuple[int, ...]) -> tuple[DispatchVerdict, str, str]:
        refusal = self._intake.refusal(dispatch, prompt)
        if refusal is not None:
            return "refused", refusal.code, refusal.message
        keys = [SequenceKey(RequestId(dispatch.request_id), state.choice) for state in dispatch.choices]
        if any(self._is_stale(key, dispatch.attempt) or self._has_newer_owner(key, dispatch.epoch) for key in keys):
            return "stale", "", ""
        if all(self._is_known(key, dispatch.attempt) for key in keys):
            return "accepted", "", ""
        if self.evacuation.leaving or not self._engine.has_room_to_queue(len(keys)):
            return "full", "", ""
        return "accepted", "", ""

    def _is_stale(self, key: SequenceKey, attempt: int) -> bool:
        """Also where the floor has expired under a sequence that runs on."""
        log = self._logs.get(key)
        return self._floors.is_stale(key, attempt) or (log is not None and log.attempt > attempt)

    def _has_newer_owner(self, key: SequenceKey, epoch: int) -> bool:
        log = self._logs.get(key)
        return log is not None and log.owner.epoch > epoch

    def _is_known(self, key: SequenceKey, attempt: int) -> bool:
        log = self._logs.get(key)
        return log is not None and log.attempt == attempt

    def _place(
        self,
        key: SequenceKey,
        state: ChoiceState,
        dispatch: Dispatch,
        prompt: tuple[int, ...],
        leader: SequenceKey | None,
        now: float,
    ) -> None:
        self._admit(key, dispatch.attempt, now)
        target = WorkerId(dispatch.decode_worker) if dispatch.decode_worker else None
        one_more_ends_it = len(state.tokens) + 1 >= dispatch.sampling.max_tokens
        hand_off = target not in (None, self.worker) and not one_more_ends_it and target in self.desk.peers
        job = SequenceJob(
            key=key,
            prompt=prompt,
            given=tuple(state.tokens),
            sampling=dispatch.sampling,
            salt=dispatch.salt,
            hand_off=hand_off,
            after=None if state.tokens else leader,
            suspect=dispatch.suspect,
        )
        self._engine.submit(job)
        log = SequenceLog(owner=_owner(dispatch), attempt=dispatch.attempt, given=len(state.tokens), tokens=list(state.tokens))
        self._sequences[key] = WorkerSequence(
            key=key,
            attempt=dispatch.attempt,
            job=job,
            log=self._logs.open(key, log),
            peer=target if hand_off else None,
            leader=job.after,
            deadline=None if dispatch.remaining_s is None else now + dispatch.remaining_s,
            suspect=dispatch.suspect,
        )

    def _on_offer(self, peer: WorkerId, offer: Offer, now: float) -> None:
        key = SequenceKey(RequestId(offer.request_id), offer.choice)
        prompt = unpack_ids(offer.prompt)
        reason = self._reason_to_refuse(key, offer, prompt)
        if reason is not None:
            self.desk.send(peer, refuse(offer, reason))
            return
        self._admit(key, offer.attempt, now)
        owner = Owner(GatewayId(offer.gateway), Incarnation(offer.gateway_incarnation), offer.epoch)
        log = SequenceLog(owner=owner, attempt=offer.attempt, given=len(offer.tokens), tokens=list(offer.tokens))
        given = tuple(offer.tokens)
        self._sequences[key] = sequence = WorkerSequence(
            key=key,
            attempt=offer.attempt,
            job=SequenceJob(key=key, prompt=prompt, given=given, sampling=offer.sampling, salt=offer.salt, suspect=offer.suspect),
            log=self._logs.open(key, log),
            peer=peer,
            receiver=Receiver(offer, peer),
            deadline=None if offer.remaining_s is None else now + offer.remaining_s,
            suspect=offer.suspect,
        )
        self.desk.take_offer(sequence)

    def _reason_to_refuse(self, key: SequenceKey, offer: Offer, prompt: tuple[int, ...]) -> RefuseReason | None:
        current = self._sequences.get(key)
        if self._floors.is_stale(key, offer.attempt) or (current is not None and current.attempt >= offer.attempt):
            return "stale"
        return self._intake.reason_to_refuse(offer, prompt) or ("draining" if self.evacuation.leaving else None)

    def _admit(self, key: SequenceKey, attempt: int, now: float) -> None:
        """A higher attempt replaces a lower one on the same worker: replacing is cancelling."""
        current = self._sequences.get(key)
        if current is not None:
            self._give_up(current, now)
        self._floors.admit(key, attempt, now)

    # ------------------------------------------------------------------ what happened

    def _on_engine_event(self, event: EngineEvent, frames: dict[GatewayId, list[FrameEntry]], now: float) -> None:
        sequence = self._sequences[event.key]
        match event:
            case TokensMade(new=new):
                sequence.log.append(new)
                self.counters.tokens += len(new.tokens)
                self.suspects.token_made(sequence)
                sequence.suspect = sequence.suspect and sequence.peer is not None
                frames.setdefault(sequence.log.owner.gateway, []).append(_frame_entry(sequence, new))
                if new.ending is not None:
                    self._on_ended(sequence, new.ending.reason, now)
                else:
                    sequence.log.state = "running"
                    sequence.first_token_at = now if sequence.first_token_at is None else sequence.first_token_at
                    self._settle(self.desk.token_made(sequence), now)
            case BlocksFilled():
                leader = self._sequences.get(sequence.leader) if sequence.leader is not None else None
                later = leader is not None and leader.peer is not None
                if sequence.leaves:  # its tokens so far are its prompt's part; they are known once it stands still
                    later = not event.complete
                    sequence.job = replace(sequence.job, given=tuple(sequence.log.tokens[:-1]))
                self._settle(self.desk.filled(sequence, event, now, later=later), now)
            case Preempted():
                sequence.log.state = "preempted"
                self.suspects.preempted(sequence)

    def _on_ended(self, sequence: WorkerSequence, reason: str, now: float) -> None:
        self.counters.ended[reason] += 1
        self.desk.give_up(sequence)
        del self._sequences[sequence.key]
        self._logs.close(sequence.key, "ended", now)
        self._offer_followers(sequence.key, now)

    def _settle(self, settled: Settled, now: float) -> None:
        """Record how hand-offs ended."""
        for sequence, settlement in settled:
            match settlement:
                case "moved":
                    if sequence.first_token_at is not None:
                        self._effects.append(ObserveHandoff(exposed_s=now - sequence.first_token_at))
                    self._logs.close(sequence.key, "moved", now, moved_to=sequence.peer)
                    if sequence.leaves:
                        self._notify(sequence, notice_of(sequence, "moved", sequence.peer))
                    del self._sequences[sequence.key]
                case "dropped" | "released":
                    self._logs.forget(sequence.key)
                    del self._sequences[sequence.key]
                case "kept" | "running":
                    sequence.log.state = "running"
                    sequence.leaves = False
            self._offer_followers(sequence.key, now)

    def _offer_followers(self, leader: SequenceKey, now: float) -> None:
        """Choices that share the leader's prompt are offered once its own hand-off is over."""
        for sequence in list(self._sequences.values()):
            if sequence.leader == leader and sequence.awaits_offer:
                self._settle(self.desk.offer(sequence, now), now)

    def _give_up(self, sequence: WorkerSequence, now: float) -> None:
        self.desk.give_up(sequence)
        del self._sequences[sequence.key]
        self._logs.forget(sequence.key)
        self._offer_followers(sequence.key, now)

    def _go_on(self, now: float) -> None:
        """What every event may have made possible."""
        self.desk.serve_queue()
        self._evacuate(now)

    def _evacuate(self, now: float) -> None:
        """Start moving what can be moved; hand back what nobody takes."""
        if not self.evacuation.leaving or not self.evacuation.has_somewhere_to_go:
            return
        for sequence in list(self._sequences.values()):
            phase = self._engine.phase(sequence.key)
            moves = sequence.leaves or sequence.peer is not None or phase is not Phase.RUNNING
            if sequence.key not in self._sequences or (moves and phase is not Phase.WAITING):
                continue
            target = self.evacuation.target(self.desk.peers, sequence.tried) if phase is Phase.RUNNING else None
            if target is None:
                self._notify(sequence, notice_of(sequence, "handed_back"))
                self.counters.ended["handed_back"] += 1
                self._give_up(sequence, now)
            else:
                sequence.leaves, sequence.peer, sequence.leader = True, target, None
                sequence.tried.add(target)
                self._engine.hand_over(sequence.key)

    def _end_overdue(self, now: float) -> None:
        """Past its deadline a sequence ends with whoever may emit its tokens; a landing is let go."""
        for sequence in list(self._sequences.values()):
            if sequence.deadline is None or now <= sequence.deadline or sequence.key not in self._sequences:
                continue
            if sequence.receiver is not None:
                self._give_up(sequence, now)
            elif sequence.log.state != "moved":
                message = "the request's deadline has passed"
                ending = Ending(reason="error", error_code=DEADLINE_CODE, error_message=message)
                new = NewTokens(first=len(sequence.log.tokens), tokens=(), ending=ending)
                sequence.log.append(new)
                self._effects.append(SendTokens(gateway=sequence.log.owner.gateway, entries=(_frame_entry(sequence, new),)))
                self._on_ended(sequence, "deadline", now)

    def _notify(self, sequence: WorkerSequence, notice: SequenceNotice) -> None:
        self._effects.append(SendNotices(gateway=sequence.log.owner.gateway, notices=(notice,)))

    def _sequence_of(self, request: str, choice: int, attempt: int) -> WorkerSequence | None:
        sequence = self._sequences.get(SequenceKey(RequestId(request), choice))
        return sequence if sequence is not None and sequence.attempt == attempt else None

    def _replay(self, item: ReplayItem, owner: Owner) -> ReplayEntry:
        key = SequenceKey(RequestId(item.request_id), item.choice)
        log = self._logs.get(key)
        if log is None or log.attempt != item.attempt:
            return ReplayEntry(request_id=item.request_id, choice=item.choice, attempt=item.attempt, state="unknown")
        if log.owner.epoch > item.epoch:
            return ReplayEntry(request_id=item.request_id, choice=item.choice, attempt=item.attempt, state="adopted")
        if owner.gateway:
            log.take_owner(owner)
        return ReplayEntry(
            request_id=item.request_id,
            choice=item.choice,
            attempt=item.attempt,
            state=self._state(key, log),
            new=log.since(item.next_index),
            moved_to=log.moved_to,
        )

    def _state(self, key: SequenceKey, log: SequenceLog) -> SequenceState:
        if log.state in ("queued", "running", "preempted") and self._engine.phase(key) is Phase.RUNNING:
            return "running"
        return log.state


def _frame_entry(sequence: WorkerSequence, new: NewTokens) -> FrameEntry:
    return FrameEntry(request_id=sequence.key.request_id, choice=sequence.key.choice, attempt=sequence.attempt, new=new)


def _owner(dispatch: Dispatch) -> Owner:
    return Owner(GatewayId(dispatch.gateway), Incarnation(dispatch.incarnation), dispatch.epoch)
