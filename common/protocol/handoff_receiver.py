"""One sequence on its way into a worker: the receiver's half of the KV hand-off.

    QUEUED ──room──▶ RESERVED ──LAST──▶ COMPLETING ──all pulls are back──▶ RUNNING
       │                │                   │
       └── withdraw, peer lost, cancelled ──┴──▶ RELEASED      (COMPLETING survives the peer's death)

The receiver reserves before it accepts; sizes come from its own reservation, never from the peer. Blocks are pulled while
the sender still computes. What cannot be copied or verified is counted by reason and computed here, from the offer, under
the same attempt.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from common.protocol.messages import Accept, Ack, Busy, HandoffMessage, Last, Offer, Ready, Refuse, RefuseReason, SenderMessage
from common.values.errors import InvariantBroken
from common.values.ids import RequestId, ReservationId, SequenceKey, WorkerId
from common.values.tokens import NewTokens
from common.values.transfer import BlockSource, PullOutcome


class ReceiverState(Enum):
    QUEUED = "queued"
    RESERVED = "reserved"
    COMPLETING = "completing"
    RUNNING = "running"
    RELEASED = "released"


ReceiverEvent = Literal["room", "last", "complete", "released", "peer lost"]
"""`last`: LAST came. `complete`: and all pulls are back. `released`: withdrawn, cancelled or replaced."""

TRANSITIONS: Mapping[ReceiverState, Mapping[ReceiverEvent, ReceiverState]] = {
    ReceiverState.QUEUED: {
        "room": ReceiverState.RESERVED,
        "released": ReceiverState.RELEASED,
        "peer lost": ReceiverState.RELEASED,
    },
    ReceiverState.RESERVED: {
        "last": ReceiverState.COMPLETING,
        "released": ReceiverState.RELEASED,
        "peer lost": ReceiverState.RELEASED,
    },
    ReceiverState.COMPLETING: {"complete": ReceiverState.RUNNING, "released": ReceiverState.RELEASED},
    ReceiverState.RUNNING: {},
    ReceiverState.RELEASED: {},
}
"""What is not in the table does not happen in that state: it is ignored, or answered with REFUSE stale."""


@dataclass(slots=True, kw_only=True)
class Receiving:
    """What an event made the receiver do. `pull`: blocks to copy now. `run`: the tokens so far and how many leading
    blocks are good; decode from there. `released`: give the reservation back (once `pulls` is zero)."""

    messages: list[HandoffMessage] = field(default_factory=list)
    pull: list[BlockSource] = field(default_factory=list)
    run: NewTokens | None = None
    good_blocks: int = 0
    released: bool = False


class Receiver:
    """Sans-I/O. `landing` is this worker's own block table for the sequence; `failures` counts outcomes by reason."""

    def __init__(self, offer: Offer, peer: WorkerId) -> None:
        self.offer = offer
        self.peer = peer
        self.state = ReceiverState.QUEUED
        self.reservation: ReservationId | None = None
        self.failures: Counter[str] = Counter()
        self.pulls = 0
        self._landing: tuple[int, ...] = ()
        self._wanted = range(0)
        self._copied: set[int] = set()
        self._asked: set[int] = set()
        self._last: NewTokens | None = None

    @property
    def key(self) -> SequenceKey:
        return SequenceKey(RequestId(self.offer.request_id), self.offer.choice)

    def queue(self) -> Receiving:
        """No room now: the sender keeps its blocks and waits."""
        offer = self.offer
        return Receiving(messages=[Busy(request_id=offer.request_id, choice=offer.choice, attempt=offer.attempt, number=offer.number)])

    def reserve(self, landing: Sequence[int], *, first_block: int, blocks: int, reservation: ReservationId) -> Receiving:
        """Room is taken: blocks `first_block .. blocks - 1` of the sequence are wanted, into `landing`."""
        if not self._step("room"):
            raise InvariantBroken(f"reserve in state {self.state}")
        self.reservation = reservation
        self._landing = tuple(landing)
        self._wanted = range(first_block, blocks)
        offer = self.offer
        accept = Accept(
            request_id=offer.request_id,
            choice=offer.choice,
            attempt=offer.attempt,
            number=offer.number,
            first_block=first_block,
            reservation=reservation,
        )
        return Receiving(messages=[accept])

    def on_ready(self, ready: Ready) -> Receiving:
        if self.state is not ReceiverState.RESERVED or ready.reservation != self.reservation:
            return Receiving(messages=[refuse(ready, "stale")])
        pull = []
        for block in ready.blocks:
            if block.index not in self._wanted or block.index in self._asked:
                self.failures["range"] += 1
                continue
            self._asked.add(block.index)
            pull.append(
                BlockSource(
                    source_block=block.block,
                    generation=block.generation,
                    checksum=block.checksum,
                    landing_block=self._landing[block.index],
                )
            )
        self.pulls += 1 if pull else 0
        return Receiving(pull=pull)

    def on_pulled(self, blocks: Sequence[BlockSource], outcomes: Sequence[PullOutcome]) -> Receiving:
        """A pull is back: nothing writes into these landing blocks any more."""
        self.pulls -= 1
        index_of = {block: index for index, block in enumerate(self._landing)}
        for block, outcome in zip(blocks, outcomes, strict=True):
            if outcome == "copied":
                self._copied.add(index_of[block.landing_block])
            else:
                self.failures[outcome] += 1
        if self.state is ReceiverState.RELEASED:
            return Receiving(released=self.pulls == 0)
        return self._complete()

    def on_last(self, last: Last) -> Receiving:
        if last.reservation != self.reservation or not self._step("last"):
            return Receiving(messages=[refuse(last, "stale")])
        self._last = last.new
        return self._complete()

    def release(self) -> Receiving:
        """Withdrawn, cancelled, replaced, or the peer is lost before LAST."""
        return Receiving(released=self.pulls == 0) if self._step("released") else Receiving()

    def on_peer_lost(self) -> Receiving:
        """What has come with LAST is enough to go on without the peer."""
        return Receiving(released=self.pulls == 0) if self._step("peer lost") else Receiving()

    def check_invariants(self) -> None:
        if self.pulls < 0 or not self._copied <= set(self._wanted):
            raise InvariantBroken("copies that nobody asked for")
        if (self.state is ReceiverState.COMPLETING) and self._last is None:
            raise InvariantBroken("completing without LAST")

    def _step(self, event: ReceiverEvent) -> bool:
        """Whether the event belongs to the present state; then the state is the next one."""
        following = TRANSITIONS[self.state].get(event)
        if following is None:
            return False
        self.state = following
        return True

    def _complete(self) -> Receiving:
        if self.state is not ReceiverState.COMPLETING or self.pulls or self._last is None or self.reservation is None:
            return Receiving()
        self._step("complete")
        good = next((index for index in self._wanted if index not in self._copied), self._wanted.stop)
        self.failures["missing"] += len(self._wanted) - len(self._asked)
        offer = self.offer
        ack = Ack(request_id=offer.request_id, choice=offer.choice, attempt=offer.attempt, reservation=self.reservation)
        return Receiving(messages=[ack], run=self._last, good_blocks=good)


def refuse(message: Offer | SenderMessage, reason: RefuseReason) -> Refuse:
    """The answer to an offer that is not taken, or to a message about a sequence that is not here (any more)."""
    return Refuse(
        request_id=message.request_id,
        choice=message.choice,
        attempt=message.attempt,
        number=message.number,
        reason=reason,
    )
