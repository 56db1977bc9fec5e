"""Where a worker's hand-offs are run: it drives the senders and receivers of its sequences and keeps the engine in step.

Every method returns what was settled by the event, for the worker to record; messages, pulls and grants go to the shared
list of effects.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from common.mesh.engine_values import BlocksFilled
from common.mesh.offer_patience import OfferPatience
from common.mesh.sequence_engine import SequenceEngine
from common.mesh.worker_effects import GrantBlocks, PullBlocks, RevokeGrant, SealBlocks, SendControl, WorkerEffect
from common.mesh.worker_sequence import Settlement, WorkerSequence
from common.protocol.handoff_receiver import Receiver, ReceiverState, Receiving, refuse
from common.protocol.handoff_sender import WAITING, Sender, Sending
from common.protocol.messages import (
    Accept,
    Ack,
    Busy,
    ControlMessage,
    Held,
    HeldSequence,
    Last,
    Offer,
    Ready,
    ReadyBlock,
    ReceiverMessage,
    Refuse,
    SenderMessage,
    Withdraw,
    pack_ids,
)
from common.values.errors import InvariantBroken
from common.values.ids import ReservationId, WorkerId
from common.values.tokens import NewTokens
from common.values.transfer import BlockSource, PullOutcome

Settled = list[tuple[WorkerSequence, Settlement]]


@dataclass(slots=True)
class PeerCounts:
    """Messages on the present connection: the list rule compares what was sent with what the peer has handled."""

    sent: int = 0
    handled: int = 0


@dataclass(slots=True)
class _Pull:
    """A copy that runs. `abandoned` is the engine's handle where the landing was released meanwhile."""

    sequence: WorkerSequence
    receiver: Receiver
    blocks: tuple[BlockSource, ...]
    abandoned: int | None = None


@dataclass(slots=True)
class _Seal:
    """Checksums that are being computed. `pin` keeps the blocks as they are."""

    sequence: WorkerSequence
    pin: int
    complete: bool
    seal_round: int


@dataclass(slots=True)
class HandoffCounters:
    """Totals since the start, by outcome and by the reason why a block could not be used."""

    settled: Counter[str] = field(default_factory=Counter)
    blocks: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    turned_away: Counter[str] = field(default_factory=Counter)


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
    """One per worker."""

    def __init__(
        self,
        *,
        engine: SequenceEngine,
        block_size: int,
        patience: OfferPatience,
        make_reservation: Callable[[], ReservationId],
        effects: list[WorkerEffect],
    ) -> None:
        self.counters = HandoffCounters()
        self._engine = engine
        self._block_size = block_size
        self._patience = patience
        self._make_reservation = make_reservation
        self._effects = effects
        self._peers: dict[WorkerId, PeerCounts] = {}
        self._queue: deque[WorkerSequence] = deque()
        self._pulls: dict[int, _Pull] = {}
        self._seals: dict[int, _Seal] = {}
        self._tickets = 0
        self._offers = 0

    # ------------------------------------------------------------------ peers

    @property
    def peers(self) -> Collection[WorkerId]:
        return self._peers.keys()

    def is_joined(self, peer: WorkerId) -> bool:
        return peer in self._peers

    def peer_joined(self, peer: WorkerId) -> None:
        self._peers[peer] = PeerCounts()

    def count_handled(self, peer: WorkerId) -> None:
        if peer in self._peers:
            self._peers[peer].handled += 1

    def send(self, peer: WorkerId, message: ControlMessage) -> None:
        """Every message to a peer goes this way, so that the list rule counts it; for a peer that is gone it is dropped."""
        counts = self._peers.get(peer)
        if isinstance(message, Refuse):
            self.counters.turned_away[message.reason] += 1
        if counts is not None:
            counts.sent += 1
            self._effects.append(SendControl(peer=peer, message=message))

    def peer_lost(self, peer: WorkerId, sequences: Iterable[WorkerSequence]) -> Settled:
        """The connection has ended. What the peer had sent before it ended still counts."""
        self._peers.pop(peer, None)
        settled: Settled = []
        for sequence in sequences:
            if sequence.peer != peer:
                continue
            if sequence.sender is not None:
                settled += self._sender_did(sequence, sequence.sender.on_peer_lost())
            if sequence.receiver is not None:
                settled += self._receiver_did(sequence, sequence.receiver.on_peer_lost())
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
                settled += self._sender_did(sequence, sender.on_peer_lost())
            if receiver is not None and _listing(receiver.offer, True) not in listed:
                settled += self._receiver_did(sequence, receiver.on_peer_lost())
        return settled

    def patience_ends_at(self, sequences: Iterable[WorkerSequence]) -> float | None:
        waiting = (s.sender for s in sequences if s.sender is not None and s.sender.state in WAITING)
        return min((self._patience.ends_at(sender) for sender in waiting), default=None)

    def end_patience(self, now: float, sequences: Iterable[WorkerSequence]) -> Settled:
        """Stop waiting for peers that have no room, or are silent."""
        settled: Settled = []
        for sequence in sequences:
            sender = sequence.sender
            if sender is not None and sender.state in WAITING and now >= self._patience.ends_at(sender):
                settled += self._sender_did(sequence, sender.keep())
        return settled

    def tick(self, sequences: Sequence[WorkerSequence]) -> None:
        """Tell each peer what we hold with it."""
        for peer, counts in self._peers.items():
            own = [entry for sequence in sequences if sequence.peer == peer for entry in _entries(sequence)]
            self.send(peer, Held(seen=counts.handled, sequences=own))

    # ------------------------------------------------------------------ sending

    def filled(self, sequence: WorkerSequence, event: BlocksFilled, now: float, *, later: bool) -> Settled:
        """Blocks of a prompt are final: seal them, and offer the sequence with the first of them, or `later`."""
        self._tickets += 1
        pin = self._engine.pin(sequence.key)
        self._seals[self._tickets] = _Seal(sequence, pin, event.complete, sequence.seal_round)
        self._effects.append(SealBlocks(ticket=self._tickets, blocks=event.blocks))
        if sequence.sender is None:
            sequence.awaits_offer = True
        return [] if later else self.offer(sequence, now)

    def offer(self, sequence: WorkerSequence, now: float) -> Settled:
        """Make the offer that is due; where the peer is gone, the sequence stays."""
        if not sequence.awaits_offer or sequence.peer is None:
            return []
        sequence.awaits_offer = False
        if not self.is_joined(sequence.peer):
            return self._sender_settled(sequence, "kept")
        self._offers += 1
        sequence.sender = Sender(_offer_of(sequence, self._offers, now), sequence.peer, now)
        self.send(sequence.peer, sequence.sender.offer)
        sequence.offer_index = self._peers[sequence.peer].sent
        blocks, sequence.sealed = sequence.sealed, []
        settled = self._sender_did(sequence, sequence.sender.sealed(blocks, complete=sequence.sealed_all))
        return settled or self.token_made(sequence)

    def token_made(self, sequence: WorkerSequence) -> Settled:
        tokens = sequence.log.whole()
        if sequence.sender is None or len(tokens.tokens) <= len(sequence.job.given):
            return []
        return self._sender_did(sequence, sequence.sender.token_made(tokens))

    def sealed(self, ticket: int, blocks: Sequence[ReadyBlock]) -> Settled:
        """A seal is back; where the sequence is over meanwhile, only its blocks are let go."""
        seal = self._seals.pop(ticket)
        self._engine.unpin(seal.pin)
        sequence = seal.sequence
        if seal.seal_round != sequence.seal_round:
            return []
        current = (sequence, seal.seal_round)
        earlier = next((other for other in self._seals.values() if (other.sequence, other.seal_round) == current), None)
        complete = seal.complete and earlier is None
        if seal.complete and earlier is not None:
            earlier.complete = True  # seals may return in any order: LAST goes with the one that returns last
        if sequence.sender is None:
            sequence.sealed.extend(blocks)
            sequence.sealed_all = sequence.sealed_all or complete
            return []
        return self._sender_did(sequence, sequence.sender.sealed(blocks, complete=complete))

    def receiver_message(self, sequence: WorkerSequence, message: ReceiverMessage) -> Settled:
        sender = sequence.sender
        if sender is None:
            return []
        match message:
            case Accept():
                return self._sender_did(sequence, sender.on_accept(message))
            case Busy():
                return self._sender_did(sequence, sender.on_busy(message.number))
            case Refuse():
                self.counters.refused[message.reason] += 1
                return self._sender_did(sequence, sender.on_refuse(message))
            case Ack():
                return self._sender_did(sequence, sender.on_ack(message))

    def take_back(self, sequence: WorkerSequence) -> Settled:
        """Decode it here after all, where that is still possible."""
        return [] if sequence.sender is None else self._sender_did(sequence, sequence.sender.keep())

    def turn_away(self, sequence: WorkerSequence) -> Settled:
        """Refuse an offer that waits for room here."""
        receiver = sequence.receiver
        if receiver is None or receiver.state is not ReceiverState.QUEUED:
            return []
        self.send(receiver.peer, refuse(receiver.offer, "draining"))
        return self._receiver_did(sequence, receiver.release())

    def give_up(self, sequence: WorkerSequence) -> None:
        """Cancelled, replaced or ended: tell the other side, whichever it is, and release the engine's part."""
        if sequence.sender is not None:
            self._sender_did(sequence, sequence.sender.ended())
        elif sequence.receiver is not None:
            if sequence.peer is not None:
                self.send(sequence.peer, refuse(sequence.receiver.offer, "stale"))
            self._receiver_did(sequence, sequence.receiver.release())
        self._engine.release(sequence.key)

    # ------------------------------------------------------------------ receiving

    def take_offer(self, sequence: WorkerSequence) -> None:
        """Reserve at once where there is room and nobody waits; else queue."""
        if not self._queue and self._reserve(sequence):
            return
        if sequence.receiver is not None:
            self._queue.append(sequence)
            self._receiver_did(sequence, sequence.receiver.queue())

    def serve_queue(self) -> None:
        """Room may have come: the longest waiting offer first."""
        while self._queue:
            receiver = self._queue[0].receiver
            if receiver is not None and receiver.state is ReceiverState.QUEUED and not self._reserve(self._queue[0]):
                return
            self._queue.popleft()

    @property
    def offers_queued(self) -> int:
        return len(self._queue)

    def sender_message(self, peer: WorkerId, message: SenderMessage, sequence: WorkerSequence | None) -> Settled:
        receiver = sequence.receiver if sequence is not None and sequence.peer == peer else None
        if sequence is None or receiver is None or receiver.offer.number != message.number:
            if not isinstance(message, Withdraw):
                self.send(peer, refuse(message, "stale"))
            return []
        match message:
            case Ready():
                return self._receiver_did(sequence, receiver.on_ready(message))
            case Last():
                did = receiver.on_last(message)
                if receiver.state in (ReceiverState.COMPLETING, ReceiverState.RUNNING):
                    sequence.log.restart(message.new)
                return self._receiver_did(sequence, did)
            case Withdraw():
                return self._receiver_did(sequence, receiver.release())

    def pulled(self, ticket: int, outcomes: Sequence[PullOutcome]) -> Settled:
        pull = self._pulls.pop(ticket)
        self.counters.blocks.update(outcomes)
        did = pull.receiver.on_pulled(pull.blocks, outcomes)
        if pull.abandoned is not None:
            if did.released:
                self._engine.reclaim(pull.abandoned)
            return []
        return self._receiver_did(pull.sequence, did)

    def leases(self, sequences: Iterable[WorkerSequence]) -> Leases:
        """What is held for peers now; each ends by one of ack, cancel, or the end of the connection."""
        senders = sum(1 for s in sequences if s.sender is not None)
        receivers = [s.receiver for s in sequences if s.receiver is not None]
        reserved = sum(1 for receiver in receivers if receiver.reservation is not None)
        return Leases(
            offers=senders,
            reservations=reserved,
            queued=len(receivers) - reserved,
            seals=len(self._seals),
            pulls=len(self._pulls),
        )

    def check_invariants(self) -> None:
        for pull in self._pulls.values():
            if pull.receiver.pulls < 1:
                raise InvariantBroken("a pull runs that its receiver does not wait for")

    # ------------------------------------------------------------------ private

    def _sender_did(self, sequence: WorkerSequence, did: Sending) -> Settled:
        sender = sequence.sender
        if sender is None:
            raise InvariantBroken("a hand-off without a sender")
        if did.granted and sender.reservation is not None:
            self._effects.append(GrantBlocks(reservation=sender.reservation, blocks=did.granted))
        for message in did.messages:
            self.send(sender.peer, message)
            if isinstance(message, Last):
                sequence.log.state, sequence.log.moved_to = "moved", sender.peer
        return [] if did.outcome is None else self._sender_settled(sequence, did.outcome)

    def _sender_settled(self, sequence: WorkerSequence, outcome: Settlement) -> Settled:
        if sequence.sender is not None and sequence.sender.reservation is not None:
            self._effects.append(RevokeGrant(reservation=sequence.sender.reservation))
        sequence.sender = None
        sequence.sealed.clear()
        sequence.sealed_all = False
        sequence.seal_round += 1
        if outcome == "kept":
            sequence.peer = None
            self._engine.keep(sequence.key)
        else:
            self._engine.release(sequence.key)
        self.counters.settled[outcome] += 1
        return [(sequence, outcome)]

    def _reserve(self, sequence: WorkerSequence) -> bool:
        receiver = sequence.receiver
        if receiver is None:
            raise InvariantBroken("a reservation without a receiver")
        positions = receiver.offer.positions
        landing = self._engine.reserve(sequence.job, positions)
        if landing is None:
            return False
        did = receiver.reserve(
            landing.blocks,
            first_block=landing.first_block,
            blocks=-(-positions // self._block_size),
            reservation=self._make_reservation(),
        )
        self._receiver_did(sequence, did)
        return True

    def _receiver_did(self, sequence: WorkerSequence, did: Receiving) -> Settled:
        receiver = sequence.receiver
        if receiver is None:
            raise InvariantBroken("a hand-off without a receiver")
        if did.pull and receiver.reservation is not None:
            self._start_pull(sequence, receiver, receiver.reservation, tuple(did.pull))
        for message in did.messages:
            self.send(receiver.peer, message)
        if receiver.state is ReceiverState.RELEASED:
            return self._release(sequence, receiver)
        return [] if did.run is None else self._activate(sequence, receiver, did.run, did.good_blocks)

    def _start_pull(
        self, sequence: WorkerSequence, receiver: Receiver, reservation: ReservationId, blocks: tuple[BlockSource, ...]
    ) -> None:
        self._tickets += 1
        self._pulls[self._tickets] = _Pull(sequence, receiver, blocks)
        self._effects.append(PullBlocks(ticket=self._tickets, peer=receiver.peer, reservation=reservation, blocks=blocks))

    def _release(self, sequence: WorkerSequence, receiver: Receiver) -> Settled:
        """A landing block is free only once no copy into it runs."""
        sequence.receiver = None
        if receiver.pulls:
            handle = self._engine.abandon(sequence.key)
            for pull in self._pulls.values():
                if pull.receiver is receiver:
                    pull.abandoned = handle
        else:
            self._engine.release(sequence.key)
        self.counters.settled["released"] += 1
        return [(sequence, "released")]

    def _activate(self, sequence: WorkerSequence, receiver: Receiver, tokens: NewTokens, good_blocks: int) -> Settled:
        good = min(good_blocks * self._block_size, receiver.offer.positions)
        self._engine.activate(sequence.key, tokens.tokens, good_positions=good)
        self.counters.blocks.update({reason: count for reason, count in receiver.failures.items() if reason in ("missing", "range")})
        sequence.receiver = None
        sequence.peer = None
        self.counters.settled["running"] += 1
        return [(sequence, "running")]


def _offer_of(sequence: WorkerSequence, number: int, now: float) -> Offer:
    job = sequence.job
    return Offer(
        request_id=sequence.key.request_id,
        choice=sequence.key.choice,
        attempt=sequence.attempt,
        number=number,
        gateway=sequence.log.owner.gateway,
        gateway_incarnation=sequence.log.owner.incarnation,
        epoch=sequence.log.owner.epoch,
        prompt=pack_ids(job.prompt),
        tokens=list(job.given),
        sampling=job.sampling,
        positions=len(job.prompt) + len(job.given),
        salt=job.salt,
        remaining_s=None if sequence.deadline is None else max(0.0, sequence.deadline - now),
        suspect=sequence.suspect,
    )


def _listing(offer: Offer, sending: bool) -> tuple[str, int, int, int, bool]:
    return (offer.request_id, offer.choice, offer.attempt, offer.number, sending)


def _entries(sequence: WorkerSequence) -> Iterable[HeldSequence]:
    if sequence.sender is not None:
        yield HeldSequence(*_listing(sequence.sender.offer, True))
    if sequence.receiver is not None:
        yield HeldSequence(*_listing(sequence.receiver.offer, False))
