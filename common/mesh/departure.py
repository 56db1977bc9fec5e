"""What leaves a worker: everything where it drains, and what belongs to a role that it has given up.

By the ordinary hand-off, under the same attempt. A worker that drains hands back what nobody takes; one that changes its role
keeps that, and serves it to the end.
"""

from common.mesh.evacuation import Evacuation
from common.mesh.handoff_desk import HandoffDesk
from common.mesh.sequence_engine import SequenceEngine
from common.mesh.sequence_life import Phase
from common.mesh.worker_ledger import WorkerLedger
from common.mesh.worker_sequence import WorkerSequence
from common.values.ids import WorkerId
from common.values.worker import Role


class Departure:
    """One per worker."""

    def __init__(self, engine: SequenceEngine, ledger: WorkerLedger, desk: HandoffDesk, evacuation: Evacuation) -> None:
        self._engine = engine
        self._ledger = ledger
        self._desk = desk
        self._evacuation = evacuation

    @property
    def under_way(self) -> bool:
        """Something of a former role is still here."""
        return any(sequence.displaced for sequence in self._ledger.sequences.values())

    def displace(self, role: Role) -> None:
        """From now on this worker has that role. A prefill worker keeps no streams, a decode worker begins none of the prompts
        that wait; what is under way to a peer goes there as it was planned."""
        for sequence in self._ledger.all():
            waits = self._engine.phase(sequence.key) is Phase.WAITING and not sequence.log.tokens
            decodes_here = sequence.peer is None or sequence.receiver is not None
            sequence.displaced = (role == "prefill" and decodes_here) or (role == "decode" and waits)
            if sequence.displaced:
                sequence.tried.clear()

    def go_on(self, now: float) -> None:
        """Start moving what can be moved; hand back what nobody takes."""
        if not self._evacuation.leaving:
            for sequence in self._ledger.all():
                if sequence.displaced and sequence.key in self._ledger.sequences:
                    self._move_displaced(sequence, now)
            return
        if not self._evacuation.has_somewhere_to_go:
            return
        for sequence in self._ledger.all():
            phase = self._engine.phase(sequence.key)
            moves = sequence.leaves or sequence.peer is not None or phase is not Phase.RUNNING
            if sequence.key not in self._ledger.sequences or (moves and phase is not Phase.WAITING):
                continue
            target = self._target(sequence, None) if phase is Phase.RUNNING else None
            if target is None:
                self._hand_back(sequence, now)
            else:
                self._send_to(sequence, target)

    def _move_displaced(self, sequence: WorkerSequence, now: float) -> None:
        phase = self._engine.phase(sequence.key)
        if phase is Phase.WAITING and not sequence.log.tokens:
            if self._evacuation.role_is_served("prefill"):
                self._hand_back(sequence, now)
            else:
                sequence.displaced = False
            return
        moves_already = sequence.leaves or sequence.peer is not None
        if moves_already or phase is not Phase.RUNNING or not sequence.log.tokens:
            return
        target = self._target(sequence, "decode")
        if target is not None:
            self._send_to(sequence, target)
        elif self._siblings_to(sequence) is not None:
            self._hand_back(sequence, now)
        else:
            sequence.displaced = False

    def _target(self, sequence: WorkerSequence, role: Role | None) -> WorkerId | None:
        """Choices of one request go to one worker."""
        return self._evacuation.target(self._desk.post.peers, sequence.tried, role, only=self._siblings_to(sequence))

    def _siblings_to(self, sequence: WorkerSequence) -> WorkerId | None:
        """Where other choices of its request went, or are on their way to."""
        leaving = (s.peer for s in self._ledger.siblings(sequence) if s.leaves)
        return self._ledger.siblings_at(sequence) or next(leaving, None)

    def _send_to(self, sequence: WorkerSequence, target: WorkerId) -> None:
        sequence.leaves, sequence.peer, sequence.leader = True, target, None
        sequence.tried.add(target)
        self._engine.hand_over(sequence.key)

    def _hand_back(self, sequence: WorkerSequence, now: float) -> None:
        self._ledger.hand_back(sequence, now, siblings_at=self._ledger.siblings_at(sequence))
