"""The sending half of a worker's hand-offs: seals what is filled, offers it, and keeps the engine in step with what the peer says."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from common.mesh.engine_values import BlocksFilled
from common.mesh.offer_patience import OfferPatience
from common.mesh.peer_post import PeerPost
from common.mesh.sequence_engine import SequenceEngine
from common.mesh.worker_effects import GrantBlocks, RevokeGrant, SealBlocks, WorkerEffect
from common.mesh.worker_sequence import Settled, Settlement, WorkerSequence
from common.protocol.handoff_sender import WAITING, Sender, Sending
from common.protocol.messages import Accept, Ack, Busy, Last, Offer, ReadyBlock, ReceiverMessage, Refuse, pack_ids
from common.values.errors import InvariantBroken


@dataclass(slots=True)
class _Seal:
    """Checksums that are being computed. `pin` keeps the blocks as they are."""

    sequence: WorkerSequence
    pin: int
    complete: bool
    seal_round: int


class SendingDesk:
    """One per worker."""

    def __init__(self, engine: SequenceEngine, post: PeerPost, patience: OfferPatience, effects: list[WorkerEffect]) -> None:
        self._engine = engine
        self._post = post
        self._patience = patience
        self._effects = effects
        self._seals: dict[int, _Seal] = {}
        self._tickets = 0
        self._offers = 0

    @property
    def seals(self) -> int:
        """That are being computed."""
        return len(self._seals)

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
        if sequence.peer not in self._post.peers:
            return self._settled(sequence, "kept")
        self._offers += 1
        sequence.sender = Sender(_offer_of(sequence, self._offers, now), sequence.peer, now)
        self._post.send(sequence.peer, sequence.sender.offer)
        sequence.offer_index = self._post.sent_to(sequence.peer)
        blocks, sequence.sealed = sequence.sealed, []
        settled = self._flowed(sequence, sequence.sender.sealed(blocks, complete=sequence.sealed_all), now)
        return settled or self.token_made(sequence, now)

    def token_made(self, sequence: WorkerSequence, now: float) -> Settled:
        tokens = sequence.log.whole()
        if sequence.sender is None or len(tokens.tokens) <= len(sequence.job.given):
            return []
        return self._flowed(sequence, sequence.sender.token_made(tokens), now)

    def sealed(self, ticket: int, blocks: Sequence[ReadyBlock], now: float) -> Settled:
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
        return self._flowed(sequence, sequence.sender.sealed(blocks, complete=complete), now)

    def receiver_message(self, sequence: WorkerSequence, message: ReceiverMessage, now: float) -> Settled:
        sender = sequence.sender
        if sender is None:
            return []
        match message:
            case Accept():
                return self._flowed(sequence, sender.on_accept(message), now)
            case Busy():
                sequence.waited_for_room = True
                return self._did(sequence, sender.on_busy(message.number))
            case Refuse():
                self._post.counters.refused[message.reason] += 1
                return self._did(sequence, sender.on_refuse(message))
            case Ack():
                return self._did(sequence, sender.on_ack(message))

    def take_back(self, sequence: WorkerSequence) -> Settled:
        """Decode it here after all, where that is still possible; also what was to be offered later."""
        if sequence.sender is not None:
            return self._did(sequence, sequence.sender.keep())
        planned = sequence.peer is not None and sequence.receiver is None
        return self._settled(sequence, "kept") if planned else []

    def end(self, sequence: WorkerSequence, sender: Sender) -> None:
        """Cancelled, replaced or ended here: tell the peer."""
        self._did(sequence, sender.ended())

    def peer_lost(self, sequence: WorkerSequence, sender: Sender) -> Settled:
        return self._did(sequence, sender.on_peer_lost())

    def patience_ends_at(self, sequences: Iterable[WorkerSequence]) -> float | None:
        waiting = (s.sender for s in sequences if s.sender is not None and s.sender.state in WAITING)
        return min((self._patience.ends_at(sender) for sender in waiting), default=None)

    def end_patience(self, now: float, sequences: Iterable[WorkerSequence]) -> Settled:
        """Stop waiting for peers that have no room, or are silent."""
        settled: Settled = []
        for sequence in sequences:
            sender = sequence.sender
            if sender is not None and sender.state in WAITING and now >= self._patience.ends_at(sender):
                settled += self._did(sequence, sender.keep())
        return settled

    def _flowed(self, sequence: WorkerSequence, did: Sending, now: float) -> Settled:
        """What goes out with the right to emit says how long the stream has been without a token."""
        stood_since = now if sequence.last_token_at is None else sequence.last_token_at
        began = self._engine.paced_from(sequence.key)
        did.messages = [
            msgspec.structs.replace(message, held_s=now - stood_since, spent_s=0.0 if began is None else now - began)
            if isinstance(message, Last)
            else message
            for message in did.messages
        ]
        return self._did(sequence, did)

    def _did(self, sequence: WorkerSequence, did: Sending) -> Settled:
        sender = sequence.sender
        if sender is None:
            raise InvariantBroken("a hand-off without a sender")
        if did.granted and sender.reservation is not None:
            self._effects.append(GrantBlocks(reservation=sender.reservation, blocks=did.granted))
        for message in did.messages:
            self._post.send(sender.peer, message)
            if isinstance(message, Last):
                sequence.log.state, sequence.log.moved_to = "moved", sender.peer
        return [] if did.outcome is None else self._settled(sequence, did.outcome)

    def _settled(self, sequence: WorkerSequence, outcome: Settlement) -> Settled:
        if sequence.sender is not None and sequence.sender.reservation is not None:
            self._effects.append(RevokeGrant(reservation=sequence.sender.reservation))
        sequence.sender = None
        sequence.awaits_offer = False
        sequence.sealed.clear()
        sequence.sealed_all = False
        sequence.seal_round += 1
        if outcome == "kept":
            sequence.peer = None
            self._engine.keep(sequence.key)
        else:
            self._engine.release(sequence.key)
        self._post.counters.settled[outcome] += 1
        return [(sequence, outcome)]


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
        tpot_s=job.promise.tpot_s,
        best_effort=job.promise.best_effort,
        gives_way=job.promise.gives_way,
        expected_tokens=job.promise.expected_tokens,
    )
