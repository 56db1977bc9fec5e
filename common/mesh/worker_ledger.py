"""What a worker holds: its sequences, their logs, the attempts below which nothing is taken; and how each of them ends."""

from collections import Counter
from dataclasses import dataclass, field

from common.mesh.handoff_desk import HandoffDesk
from common.mesh.suspects import notice_of
from common.mesh.worker_effects import ObserveHandoff, SendNotices, SendTokens, WorkerEffect
from common.mesh.worker_sequence import Settled, WorkerSequence
from common.policy.transfer_time import TransferMeter
from common.protocol.attempt_floor import AttemptFloors
from common.protocol.messages import FrameEntry, SequenceNotice, StageSeconds
from common.protocol.token_log import TokenLogs
from common.values.ids import RequestId, SequenceKey, WorkerId
from common.values.tokens import DEADLINE_CODE, Ending, NewTokens


@dataclass(slots=True)
class WorkerCounters:
    """Totals since the start; the shell shows them as metrics."""

    dispatched: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    stale_cancels: int = 0


class WorkerLedger:
    """One per worker."""

    def __init__(self, desk: HandoffDesk, effects: list[WorkerEffect]) -> None:
        self.counters = WorkerCounters()
        self.floors = AttemptFloors()
        self.logs = TokenLogs()
        self.transfers = TransferMeter()
        self.sequences: dict[SequenceKey, WorkerSequence] = {}
        self.effects = effects
        self._desk = desk

    def all(self) -> list[WorkerSequence]:
        return list(self.sequences.values())

    def is_stale(self, key: SequenceKey, attempt: int) -> bool:
        """Also where the floor has expired under a sequence that runs on."""
        log = self.logs.get(key)
        return self.floors.is_stale(key, attempt) or (log is not None and log.attempt > attempt)

    def has_newer_owner(self, key: SequenceKey, epoch: int) -> bool:
        log = self.logs.get(key)
        return log is not None and log.owner.epoch > epoch

    def is_known(self, key: SequenceKey, attempt: int) -> bool:
        log = self.logs.get(key)
        return log is not None and log.attempt == attempt

    def admit(self, key: SequenceKey, attempt: int, now: float) -> None:
        """A higher attempt replaces a lower one on the same worker: replacing is cancelling."""
        current = self.sequences.get(key)
        if current is not None:
            self.give_up(current, now)
        self.floors.admit(key, attempt, now)

    def end(self, sequence: WorkerSequence, reason: str, now: float) -> None:
        self.counters.ended[reason] += 1
        self._desk.give_up(sequence)
        del self.sequences[sequence.key]
        self.logs.close(sequence.key, "ended", now)
        self._offer_followers(sequence.key, now)

    def settle(self, settled: Settled, now: float) -> None:
        """Record how hand-offs ended."""
        for sequence, settlement in settled:
            if self.sequences.get(sequence.key) is not sequence:
                continue  # handed back with a sibling
            match settlement:
                case "moved":
                    self._observe(sequence, now)
                    self.logs.close(sequence.key, "moved", now, moved_to=sequence.peer)
                    if sequence.leaves:
                        self.notify(sequence, notice_of(sequence, "moved", sequence.peer))
                    del self.sequences[sequence.key]
                case "dropped" | "released":
                    self.logs.forget(sequence.key)
                    del self.sequences[sequence.key]
                case "kept":
                    self._keep(sequence, now)
                case "running":
                    sequence.log.state = "running"
                    sequence.leaves = False
            self._offer_followers(sequence.key, now)

    def siblings(self, sequence: WorkerSequence) -> list[WorkerSequence]:
        """The other choices of its request that are here."""
        key, attempt = sequence.key, sequence.attempt
        return [s for s in self.all() if s.key.request_id == key.request_id and s is not sequence and s.attempt == attempt]

    def siblings_at(self, sequence: WorkerSequence) -> WorkerId | None:
        """Where other choices of its attempt were handed with the right to emit, though they be cancelled since."""
        logs = [log for key, log in self.logs.of_request(sequence.key.request_id) if key != sequence.key]
        return next((log.moved_to for log in logs if log.state == "moved" and log.attempt == sequence.attempt), None)

    def _keep(self, sequence: WorkerSequence, now: float) -> None:
        """Choices decode on one worker of an attempt at a time, so that a request which takes workers down takes one. Where
        siblings decode elsewhere, it goes back to its gateway; else they stay here too."""
        elsewhere = self.siblings_at(sequence)
        if elsewhere is not None:
            self.hand_back(sequence, now, siblings_at=elsewhere)
            return
        sequence.log.state = "running"
        sequence.leaves = False
        for sibling in self.siblings(sequence):
            self.settle(self._desk.sending.take_back(sibling), now)

    def hand_back(self, sequence: WorkerSequence, now: float, *, siblings_at: WorkerId | None = None) -> None:
        """Its gateway is to place the request again. Of its choices nothing stays here but what was handed on."""
        self.notify(sequence, notice_of(sequence, "handed_back", siblings_at))
        parts = [sequence, *(s for s in self.siblings(sequence) if s.log.state != "moved")]
        for part in parts:
            part.awaits_offer = False
        for part in parts:
            self.counters.ended["handed_back"] += 1
            self.give_up(part, now)

    def _observe(self, sequence: WorkerSequence, now: float) -> None:
        """Who waited for room at the peer does not say how long a transfer takes."""
        if sequence.last_token_at is None:
            return
        exposed_s = now - sequence.last_token_at
        self.effects.append(ObserveHandoff(exposed_s=exposed_s))
        if not sequence.waited_for_room:
            self.transfers.observe(len(sequence.job.prompt) + len(sequence.log.tokens), exposed_s)

    def _offer_followers(self, leader: SequenceKey, now: float) -> None:
        """Choices that share the leader's prompt are offered once its own hand-off is over."""
        for sequence in list(self.sequences.values()):
            if sequence.leader == leader and sequence.awaits_offer:
                self.settle(self._desk.sending.offer(sequence, now), now)

    def give_up(self, sequence: WorkerSequence, now: float) -> None:
        self._desk.give_up(sequence)
        del self.sequences[sequence.key]
        self.forget(sequence.key, now)
        self._offer_followers(sequence.key, now)

    def forget(self, key: SequenceKey, now: float) -> None:
        """Nobody asks for what was cancelled. But where it was handed on, siblings that are still here must not decode here: nobody
        knows when the peer hears of the cancel."""
        log = self.logs.get(key)
        if log is not None and log.state == "moved" and self._holds_another(key, log.attempt):
            self.logs.close(key, "moved", now, moved_to=log.moved_to)
        else:
            self.logs.forget(key)

    def _holds_another(self, key: SequenceKey, attempt: int) -> bool:
        held = self.sequences.values()
        return any(s.key.request_id == key.request_id and s.key != key and s.attempt == attempt for s in held)

    def end_overdue(self, now: float) -> None:
        """Past its deadline a sequence ends with whoever may emit its tokens; a landing is let go."""
        for sequence in list(self.sequences.values()):
            if sequence.deadline is None or now <= sequence.deadline or sequence.key not in self.sequences:
                continue
            if sequence.receiver is not None:
                self.give_up(sequence, now)
            elif sequence.log.state != "moved":
                message = "the request's deadline has passed"
                ending = Ending(reason="error", error_code=DEADLINE_CODE, error_message=message)
                new = NewTokens(first=len(sequence.log.tokens), tokens=(), ending=ending)
                sequence.log.append(new)
                self.effects.append(SendTokens(gateway=sequence.log.owner.gateway, entries=(frame_entry(sequence, new),)))
                self.end(sequence, "deadline", now)

    def notify(self, sequence: WorkerSequence, notice: SequenceNotice) -> None:
        self.effects.append(SendNotices(gateway=sequence.log.owner.gateway, notices=(notice,)))

    def sequence_of(self, request: str, choice: int, attempt: int) -> WorkerSequence | None:
        sequence = self.sequences.get(SequenceKey(RequestId(request), choice))
        return sequence if sequence is not None and sequence.attempt == attempt else None


def frame_entry(sequence: WorkerSequence, new: NewTokens, stages: StageSeconds | None = None) -> FrameEntry:
    return FrameEntry(request_id=sequence.key.request_id, choice=sequence.key.choice, attempt=sequence.attempt, new=new, stages=stages)
