"""One suspect at a time, announced first: how a worker finds out for its gateway which request takes workers down.

A sequence that was recovered from the loss of a worker is a suspect until its next token. It gets its blocks like any other,
but its first row waits until its gateway has been told; meanwhile everything else goes on. Should this worker be lost then,
only the announced one is charged.
"""

from collections.abc import Mapping

from common.mesh.sequence_engine import SequenceEngine
from common.mesh.worker_effects import AnnounceSuspect, SendNotices, WorkerEffect
from common.mesh.worker_sequence import WorkerSequence
from common.protocol.messages import NoticeKind, SequenceNotice
from common.values.errors import InvariantBroken
from common.values.ids import SequenceKey, WorkerId


class Suspects:
    """One per worker. `current` was announced and has made no token since."""

    def __init__(self, engine: SequenceEngine, effects: list[WorkerEffect]) -> None:
        self._engine = engine
        self._effects = effects
        self._tickets = 0
        self.announced = 0
        self.current: WorkerSequence | None = None

    def serve(self, sequences: Mapping[SequenceKey, WorkerSequence]) -> None:
        """Announce the next one, where none is under way."""
        if self._current_in(sequences) is not None:
            return
        self.current = None
        key = self._engine.next_suspect()
        if key is None:
            return
        self.current = sequence = sequences[key]
        self._tickets += 1
        self.announced += 1
        self._effects.append(
            AnnounceSuspect(ticket=self._tickets, gateway=sequence.log.owner.gateway, notice=notice_of(sequence, "suspect"))
        )

    def on_announced(self, ticket: int, sequences: Mapping[SequenceKey, WorkerSequence]) -> None:
        """The announcement is out, or was given the time that it gets. Where it is over meanwhile, nothing happens."""
        current = self._current_in(sequences)
        if ticket == self._tickets and current is not None:
            self._engine.clear_suspect(current.key)

    def _current_in(self, sequences: Mapping[SequenceKey, WorkerSequence]) -> WorkerSequence | None:
        """A key may have come to name a newer attempt, which was not announced."""
        current = self.current
        return current if current is not None and sequences.get(current.key) is current else None

    def token_made(self, sequence: WorkerSequence) -> None:
        if self.current is sequence:
            self.current = None

    def preempted(self, sequence: WorkerSequence) -> None:
        """It has lost its blocks before it made a token: another one may be tried meanwhile."""
        if self.current is sequence and self._engine.bar_suspect(sequence.key):
            self.current = None
            self._effects.append(SendNotices(gateway=sequence.log.owner.gateway, notices=(notice_of(sequence, "cleared"),)))

    def check_invariants(self) -> None:
        cleared = self._engine.cleared_suspects
        if cleared and (self.current is None or cleared != [self.current.key]):
            raise InvariantBroken(f"suspects {cleared} may run, announced is {self.current}")


def notice_of(sequence: WorkerSequence, kind: NoticeKind, moved_to: WorkerId | None = None) -> SequenceNotice:
    return SequenceNotice(
        request_id=sequence.key.request_id,
        choice=sequence.key.choice,
        attempt=sequence.attempt,
        kind=kind,
        moved_to=moved_to,
    )
