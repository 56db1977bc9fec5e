"""Where a worker's hand-offs are run: it drives the senders and receivers of its sequences and keeps the engine in step.

Every method returns what was settled by the event, for the worker to record; messages, pulls and grants go to the shared
list of effects.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from common.mesh.offer_patience import OfferPatience
from common.mesh.peer_post import HandoffCounters, PeerPost
from common.mesh.receiving_desk import ReceivingDesk
from common.mesh.sending_desk import SendingDesk
from common.mesh.sequence_engine import SequenceEngine
from common.mesh.worker_effects import WorkerEffect
from common.mesh.worker_sequence import Settled, WorkerSequence
from common.protocol.messages import Held, HeldSequence, Offer
from common.values.ids import ReservationId, WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Leases:
    """`offers` that this worker made and that are not over, `reservations` and `queued` offers of peers here, `seals` and
    `pulls` under way."""

    offers: int
    reservations: int
    queued: int
    seals: int
    pulls: int


class HandoffDesk:
    """One per worker: its `sending` and its `receiving` half, and what concerns both."""

    def __init__(
        self,
        *,
        engine: SequenceEngine,
        block_size: int,
        patience: OfferPatience,
        make_reservation: Callable[[], ReservationId],
        effects: list[WorkerEffect],
    ) -> None:
        self._engine = engine
        self.post = PeerPost(effects)
        self.sending = SendingDesk(engine, self.post, patience, effects)
        self.receiving = ReceivingDesk(engine, self.post, block_size, make_reservation, effects)

    @property
    def counters(self) -> HandoffCounters:
        return self.post.counters

    def peer_lost(self, peer: WorkerId, sequences: Iterable[WorkerSequence]) -> Settled:
        """The connection has ended. What the peer had sent before it ended still counts."""
        self.post.lost(peer)
        settled: Settled = []
        for sequence in sequences:
            if sequence.peer != peer:
                continue
            if sequence.sender is not None:
                settled += self.sending.peer_lost(sequence, sequence.sender)
            if sequence.receiver is not None:
                settled += self.receiving.peer_lost(sequence, sequence.receiver)
        return settled

    def held(self, peer: WorkerId, held: Held, sequences: Iterable[WorkerSequence]) -> Settled:
        """The list rule: what the peer should hold with us and does not list is over here too."""
        listed = {(h.request_id, h.choice, h.attempt, h.number, h.sending) for h in held.sequences}
        settled: Settled = []
        for sequence in sequences:
            if sequence.peer != peer:
                continue
            sender, receiver = sequence.sender, sequence.receiver
            if sender is not None and sequence.offer_index <= held.seen and _listing(sender.offer, False) not in listed:
                settled += self.sending.peer_lost(sequence, sender)
            if receiver is not None and _listing(receiver.offer, True) not in listed:
                settled += self.receiving.peer_lost(sequence, receiver)
        return settled

    def tick(self, sequences: Sequence[WorkerSequence]) -> None:
        """Tell each peer what we hold with it."""
        for peer, counts in self.post.counts():
            own = [entry for sequence in sequences if sequence.peer == peer for entry in _entries(sequence)]
            self.post.send(peer, Held(seen=counts.handled, sequences=own))

    def give_up(self, sequence: WorkerSequence) -> None:
        """Cancelled, replaced or ended: tell the other side, whichever it is, and release the engine's part."""
        if sequence.sender is not None:
            self.sending.end(sequence, sequence.sender)
        elif sequence.receiver is not None:
            self.receiving.give_up(sequence, sequence.receiver)
        self._engine.release(sequence.key)

    def leases(self, sequences: Iterable[WorkerSequence]) -> Leases:
        """What is held for peers now; each ends by one of ack, cancel, or the end of the connection."""
        held = list(sequences)
        receivers = [s.receiver for s in held if s.receiver is not None]
        reserved = sum(1 for receiver in receivers if receiver.reservation is not None)
        return Leases(
            offers=sum(1 for s in held if s.sender is not None),
            reservations=reserved,
            queued=len(receivers) - reserved,
            seals=self.sending.seals,
            pulls=self.receiving.pulls,
        )

    def check_invariants(self) -> None:
        self.receiving.check_invariants()


def _listing(offer: Offer, sending: bool) -> tuple[str, int, int, int, bool]:
    return (offer.request_id, offer.choice, offer.attempt, offer.number, sending)


def _entries(sequence: WorkerSequence) -> Iterable[HeldSequence]:
    if sequence.sender is not None:
        yield HeldSequence(*_listing(sequence.sender.offer, True))
    if sequence.receiver is not None:
        yield HeldSequence(*_listing(sequence.receiver.offer, False))
