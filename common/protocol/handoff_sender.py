"""One sequence on its way out of a worker: the sender's half of the KV hand-off.

    OFFERED ──accept──▶ ACCEPTED ──prompt and first token done: LAST──▶ LAST_SENT ──ack──▶ MOVED
       │ busy                │                                              │
       ▼                     │ refuse, peer lost, kept: WITHDRAW            │ peer lost (never decode again: the probe decides)
      BUSY ──accept──▶ …     ▼                                              ▼
       └──bound passed──▶  KEPT                                           MOVED
    any state ──refuse stale, cancelled, ended──▶ DROPPED

The sender emits nothing after LAST, the receiver nothing before it: with LAST goes the right to emit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from common.protocol.messages import (
    Accept,
    Ack,
    ForwardedCancel,
    HandoffMessage,
    Last,
    Offer,
    Ready,
    ReadyBlock,
    Refuse,
    Withdraw,
)
from common.values.errors import InvariantBroken
from common.values.ids import RequestId, ReservationId, SequenceKey, WorkerId
from common.values.tokens import NewTokens


class SenderState(Enum):
    OFFERED = "offered"
    BUSY = "busy"
    ACCEPTED = "accepted"
    LAST_SENT = "last_sent"
    MOVED = "moved"
    KEPT = "kept"
    DROPPED = "dropped"


SenderEvent = Literal["accept", "busy", "last", "ack", "stale", "refused", "kept", "peer lost", "ended"]
"""`last`: LAST was sent. `refused`: for any reason but stale. `kept`: our patience is over. `ended`: here, or cancelled."""

_TAKEN_BACK: dict[SenderEvent, SenderState] = {
    "refused": SenderState.KEPT,
    "kept": SenderState.KEPT,
    "peer lost": SenderState.KEPT,
    "stale": SenderState.DROPPED,
    "ended": SenderState.DROPPED,
}
TRANSITIONS: Mapping[SenderState, Mapping[SenderEvent, SenderState]] = {
    SenderState.OFFERED: {"accept": SenderState.ACCEPTED, "busy": SenderState.BUSY, **_TAKEN_BACK},
    SenderState.BUSY: {"accept": SenderState.ACCEPTED, **_TAKEN_BACK},
    SenderState.ACCEPTED: {"last": SenderState.LAST_SENT, **_TAKEN_BACK},
    SenderState.LAST_SENT: {
        "ack": SenderState.MOVED,
        "peer lost": SenderState.MOVED,
        "stale": SenderState.DROPPED,
        "ended": SenderState.DROPPED,
    },
    SenderState.MOVED: {},
    SenderState.KEPT: {},
    SenderState.DROPPED: {},
}
"""What is not in the table does not happen in that state: such an event is an answer to what is over, and is ignored."""

WAITING = (SenderState.OFFERED, SenderState.BUSY)
BEFORE_LAST = (*WAITING, SenderState.ACCEPTED)
ENDS = tuple(state for state, events in TRANSITIONS.items() if not events)
Outcome = Literal["moved", "kept", "dropped"]


@dataclass(slots=True, kw_only=True)
class Sending:
    """What an event made the sender do: messages for the peer in order, blocks that the peer may read from now on, and
    an outcome at the end: `moved` (release, the peer has it), `kept` (decode here), `dropped` (release)."""

    messages: list[HandoffMessage] = field(default_factory=list)
    granted: dict[int, int] = field(default_factory=dict)
    outcome: Outcome | None = None


class Sender:
    """Sans-I/O. Events that do not fit the state are answers to what is over: they are ignored."""

    def __init__(self, offer: Offer, peer: WorkerId, now: float) -> None:
        self.offer = offer
        self.peer = peer
        self.offered_at = now
        self.state = SenderState.OFFERED
        self.reservation: ReservationId | None = None
        self._first_block = 0
        self._sealed: list[ReadyBlock] = []
        self._complete = False
        self._tokens: NewTokens | None = None

    @property
    def key(self) -> SequenceKey:
        return SequenceKey(RequestId(self.offer.request_id), self.offer.choice)

    def sealed(self, blocks: Sequence[ReadyBlock], *, complete: bool) -> Sending:
        """Blocks that will not change any more; `complete` with the last of the prompt."""
        self._complete = self._complete or complete
        if self.state in BEFORE_LAST:
            self._sealed.extend(blocks)
        return self._flow()

    def token_made(self, tokens: NewTokens) -> Sending:
        """The first new token exists; `tokens` are all new tokens so far, from index 0."""
        self._tokens = tokens
        return self._flow()

    def ended(self) -> Sending:
        """The sequence ended here, or was cancelled: nothing is left to hand over."""
        before = self.state
        if not self._step("ended"):
            return Sending()
        if before is not SenderState.LAST_SENT:
            return self._finished(self._withdraw())
        offer = self.offer
        return self._finished(ForwardedCancel(request_id=offer.request_id, choice=offer.choice, attempt=offer.attempt))

    def keep(self) -> Sending:
        """Take the sequence back, while that is still possible."""
        return self._finished(self._withdraw()) if self._step("kept") else Sending()

    def on_accept(self, accept: Accept) -> Sending:
        if accept.number != self.offer.number or not self._step("accept"):
            return Sending()
        self.reservation = ReservationId(accept.reservation)
        self._first_block = accept.first_block
        return self._flow()

    def on_busy(self, number: int) -> Sending:
        if number == self.offer.number:
            self._step("busy")
        return Sending()

    def on_refuse(self, refuse: Refuse) -> Sending:
        if refuse.number != self.offer.number:
            return Sending()
        return self._finished() if self._step("stale" if refuse.reason == "stale" else "refused") else Sending()

    def on_ack(self, ack: Ack) -> Sending:
        return self._finished() if ack.reservation == self.reservation and self._step("ack") else Sending()

    def on_peer_lost(self) -> Sending:
        """Also when the peer, asked what it holds with us, does not list this sequence."""
        return self._finished() if self._step("peer lost") else Sending()

    def check_invariants(self) -> None:
        if self.state in (SenderState.ACCEPTED, SenderState.LAST_SENT) and self.reservation is None:
            raise InvariantBroken("accepted without a reservation")
        if self.state is SenderState.LAST_SENT and not (self._complete and self._tokens):
            raise InvariantBroken("the right to emit went before the prompt was done")

    def _flow(self) -> Sending:
        """Send what is sealed and wanted; with the last of it and the first token, the right to emit."""
        sending = Sending()
        if self.state is not SenderState.ACCEPTED or self.reservation is None:
            return sending
        wanted = [block for block in self._sealed if block.index >= self._first_block]
        self._sealed.clear()
        if wanted:
            sending.granted = {block.block: block.generation for block in wanted}
            sending.messages.append(self._ready(self.reservation, wanted))
        if self._complete and self._tokens is not None:
            self._step("last")
            sending.messages.append(self._last(self.reservation, self._tokens))
        return sending

    def _ready(self, reservation: ReservationId, blocks: list[ReadyBlock]) -> Ready:
        offer = self.offer
        return Ready(
            request_id=offer.request_id,
            choice=offer.choice,
            attempt=offer.attempt,
            number=offer.number,
            reservation=reservation,
            blocks=blocks,
        )

    def _last(self, reservation: ReservationId, tokens: NewTokens) -> Last:
        offer = self.offer
        return Last(
            request_id=offer.request_id,
            choice=offer.choice,
            attempt=offer.attempt,
            number=offer.number,
            reservation=reservation,
            new=tokens,
        )

    def _withdraw(self) -> Withdraw:
        offer = self.offer
        return Withdraw(request_id=offer.request_id, choice=offer.choice, attempt=offer.attempt, number=offer.number)

    def _step(self, event: SenderEvent) -> bool:
        """Whether the event belongs to the present state; then the state is the next one."""
        following = TRANSITIONS[self.state].get(event)
        if following is None:
            return False
        self.state = following
        return True

    def _finished(self, *messages: HandoffMessage) -> Sending:
        self._sealed.clear()
        return Sending(messages=list(messages), outcome=_OUTCOMES[self.state])


_OUTCOMES: Mapping[SenderState, Outcome] = {
    SenderState.MOVED: "moved",
    SenderState.KEPT: "kept",
    SenderState.DROPPED: "dropped",
}
