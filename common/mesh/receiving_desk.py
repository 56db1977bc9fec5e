"""The receiving half of a worker's hand-offs: reserves before it accepts, pulls what is ready, and runs what has come whole."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.mesh.peer_post import PeerPost
from common.mesh.sequence import Stamps
from common.mesh.sequence_engine import SequenceEngine
from common.mesh.worker_effects import PullBlocks, WorkerEffect
from common.mesh.worker_sequence import Settled, TakenOver, WorkerSequence
from common.protocol.handoff_receiver import Receiver, ReceiverState, Receiving, refuse
from common.protocol.messages import Last, Ready, SenderMessage, Withdraw
from common.values.errors import InvariantBroken
from common.values.ids import ReservationId, WorkerId
from common.values.tokens import NewTokens
from common.values.transfer import BlockSource, PullOutcome


@dataclass(slots=True)
class _Pull:
    """A copy that runs. `abandoned` is the engine's handle where the landing was released meanwhile."""

    sequence: WorkerSequence
    receiver: Receiver
    blocks: tuple[BlockSource, ...]
    abandoned: int | None = None


class ReceivingDesk:
    """One per worker."""

    def __init__(
        self,
        engine: SequenceEngine,
        post: PeerPost,
        block_size: int,
        make_reservation: Callable[[], ReservationId],
        effects: list[WorkerEffect],
    ) -> None:
        self._engine = engine
        self._post = post
        self._block_size = block_size
        self._make_reservation = make_reservation
        self._effects = effects
        self._queue: deque[WorkerSequence] = deque()
        self._pulls: dict[int, _Pull] = {}
        self._tickets = 0

    @property
    def pulls(self) -> int:
        """That are under way."""
        return len(self._pulls)

    def take_offer(self, sequence: WorkerSequence) -> None:
        """Reserve at once where there is room and nobody waits; else queue."""
        if not self._queue and self._reserve(sequence):
            return
        if sequence.receiver is not None:
            self._queue.append(sequence)
            self._did(sequence, sequence.receiver.queue())

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

    def sender_message(self, peer: WorkerId, message: SenderMessage, sequence: WorkerSequence | None, now: float) -> Settled:
        receiver = sequence.receiver if sequence is not None and sequence.peer == peer else None
        if sequence is None or receiver is None or receiver.offer.number != message.number:
            if not isinstance(message, Withdraw):
                self._post.send(peer, refuse(message, "stale"))
            return []
        match message:
            case Ready():
                return self._did(sequence, receiver.on_ready(message))
            case Last():
                did = receiver.on_last(message)
                if receiver.state in (ReceiverState.COMPLETING, ReceiverState.RUNNING):
                    sequence.log.restart(message.new)
                    sequence.taken_over = TakenOver(at=now, held_s=message.held_s, spent_s=message.spent_s)
                return self._ran(sequence, did, now)
            case Withdraw():
                return self._did(sequence, receiver.release())

    def pulled(self, ticket: int, outcomes: Sequence[PullOutcome], now: float) -> Settled:
        pull = self._pulls.pop(ticket)
        self._post.counters.blocks.update(outcomes)
        did = pull.receiver.on_pulled(pull.blocks, outcomes)
        if pull.abandoned is not None:
            if did.released:
                self._engine.reclaim(pull.abandoned)
            return []
        return self._ran(pull.sequence, did, now)

    def turn_away(self, sequence: WorkerSequence) -> Settled:
        """Refuse an offer that waits for room here."""
        receiver = sequence.receiver
        if receiver is None or receiver.state is not ReceiverState.QUEUED:
            return []
        self._post.send(receiver.peer, refuse(receiver.offer, "draining"))
        return self._did(sequence, receiver.release())

    def give_up(self, sequence: WorkerSequence, receiver: Receiver) -> None:
        """Cancelled or replaced here: tell the peer."""
        if sequence.peer is not None:
            self._post.send(sequence.peer, refuse(receiver.offer, "stale"))
        self._did(sequence, receiver.release())

    def peer_lost(self, sequence: WorkerSequence, receiver: Receiver) -> Settled:
        return self._did(sequence, receiver.on_peer_lost())

    def check_invariants(self) -> None:
        for pull in self._pulls.values():
            if pull.receiver.pulls < 1:
                raise InvariantBroken("a pull runs that its receiver does not wait for")

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
        self._did(sequence, did)
        return True

    def _did(self, sequence: WorkerSequence, did: Receiving) -> Settled:
        receiver = sequence.receiver
        if receiver is None:
            raise InvariantBroken("a hand-off without a receiver")
        if did.pull and receiver.reservation is not None:
            self._start_pull(sequence, receiver, receiver.reservation, tuple(did.pull))
        for message in did.messages:
            self._post.send(receiver.peer, message)
        return self._release(sequence, receiver) if receiver.state is ReceiverState.RELEASED else []

    def _ran(self, sequence: WorkerSequence, did: Receiving, now: float) -> Settled:
        """The same, where the sequence may have come whole."""
        receiver, settled = sequence.receiver, self._did(sequence, did)
        if did.run is None or receiver is None:
            return settled
        return self._activate(sequence, receiver, did.run, did.good_blocks, now)

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
        self._post.counters.settled["released"] += 1
        return [(sequence, "released")]

    def _activate(self, sequence: WorkerSequence, receiver: Receiver, tokens: NewTokens, good_blocks: int, now: float) -> Settled:
        good = min(good_blocks * self._block_size, receiver.offer.positions)
        stamps = _stamps(sequence, now)
        self._engine.activate(sequence.key, tokens.tokens, good_positions=good, stamps=stamps)
        self._post.counters.blocks.update(
            {reason: count for reason, count in receiver.failures.items() if reason in ("missing", "range")}
        )
        sequence.receiver = None
        sequence.peer = None
        self._post.counters.settled["running"] += 1
        return [(sequence, "running")]


def _stamps(sequence: WorkerSequence, now: float) -> Stamps:
    """The sender has said how long the stream had stood when LAST left it; the rest of the transfer is ours."""
    taken = sequence.taken_over
    if taken is None:
        raise InvariantBroken("an import came whole without LAST")
    moved_in_its_middle = taken.spent_s > taken.held_s
    return Stamps(
        came_at=now,
        told=moved_in_its_middle,
        transfer_s=taken.held_s + now - taken.at,
        paced_from=taken.at - taken.spent_s,
        paced_tokens=1,
    )
