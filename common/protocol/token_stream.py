"""The gateway's view of one choice: tokens in order, once, from the current attempt only.

    FLOWING ──a frame ahead of the next index──▶ GAP ──nothing waits any more, or another attempt──▶ FLOWING
       │                                          │
       └────── the end, or no more is wanted ─────┴──▶ ENDED

The broker orders per publisher; a sequence that moves has two publishers. A frame ahead of the next index waits in a
bounded buffer; what the buffer cannot take comes again by replay.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from common.values.errors import InvariantBroken
from common.values.tokens import NewTokens

MAX_FRAMES_AHEAD = 256


class StreamState(Enum):
    FLOWING = "flowing"
    GAP = "gap"
    ENDED = "ended"


StreamEvent = Literal["ahead", "filled", "replaced", "ended"]
"""`ahead`: a frame came that starts behind the next index. `filled`: what was missing came, nothing waits. `replaced`: a higher
attempt. `ended`: the ending was taken, or no more is wanted."""

TRANSITIONS: Mapping[StreamState, Mapping[StreamEvent, StreamState]] = {
    StreamState.FLOWING: {
        "ahead": StreamState.GAP,
        "replaced": StreamState.FLOWING,
        "ended": StreamState.ENDED,
    },
    StreamState.GAP: {
        "ahead": StreamState.GAP,
        "filled": StreamState.FLOWING,
        "replaced": StreamState.FLOWING,
        "ended": StreamState.ENDED,
    },
    StreamState.ENDED: {},
}
"""Frames that are known, or of another attempt, or come after the end, are no event: they are ignored. What else is not in the
table must not happen."""


@dataclass(slots=True, kw_only=True)
class TokenStream:
    """`tokens` is what was accepted so far; the next token wanted has index `len(tokens)`."""

    choice: int
    attempt: int = 0
    tokens: list[int] = field(default_factory=list)
    state: StreamState = StreamState.FLOWING
    ahead: dict[int, NewTokens] = field(default_factory=dict)

    @property
    def next_index(self) -> int:
        return len(self.tokens)

    @property
    def has_gap(self) -> bool:
        return self.state is StreamState.GAP

    @property
    def ended(self) -> bool:
        return self.state is StreamState.ENDED

    def raise_attempt(self, attempt: int) -> None:
        """Frames of lower attempts are dropped from now on, those that waited too."""
        if attempt <= self.attempt:
            raise InvariantBroken(f"attempt {attempt} after {self.attempt}")
        self._step("replaced")
        self.attempt = attempt
        self.ahead.clear()

    def close(self) -> None:
        """No more of it is wanted: its client left, or a stop string was matched. Of an ended one neither."""
        if not self.ended:
            self._end()

    def accept(self, attempt: int, new: NewTokens) -> list[NewTokens]:
        """What may be delivered now, in order. Duplicates and what is of another attempt yield nothing."""
        if attempt != self.attempt or self.ended:
            return []
        if new.first > self.next_index:
            self._keep_ahead(new)
            return []
        delivered = self._take(new)
        while not self.ended and self.ahead:
            first = min(self.ahead)
            if first > self.next_index:
                break
            delivered += self._take(self.ahead.pop(first))
        if self.has_gap and not self.ahead:
            self._step("filled")
        return delivered

    def check_invariants(self) -> None:
        """What waits lies ahead and is bounded, and only where there is a gap."""
        if self.has_gap != bool(self.ahead):
            raise InvariantBroken(f"{len(self.ahead)} frames wait in state {self.state.value}")
        if any(first <= self.next_index or first != new.first for first, new in self.ahead.items()):
            raise InvariantBroken("a frame waits that could have been taken")
        if len(self.ahead) > MAX_FRAMES_AHEAD:
            raise InvariantBroken(f"{len(self.ahead)} frames wait")

    def _keep_ahead(self, new: NewTokens) -> None:
        """Of two frames with one start the one that reaches further stays."""
        self._step("ahead")
        known = self.ahead.get(new.first)
        if known is None:
            if len(self.ahead) < MAX_FRAMES_AHEAD:
                self.ahead[new.first] = new
        elif len(new.tokens) > len(known.tokens) or (len(new.tokens) == len(known.tokens) and known.ending is None):
            self.ahead[new.first] = new

    def _take(self, new: NewTokens) -> list[NewTokens]:
        known = self.next_index - new.first
        if known > len(new.tokens) or (known == len(new.tokens) and new.ending is None):
            return []
        fresh = new if known == 0 else _rest(new, known)
        self.tokens.extend(fresh.tokens)
        if fresh.ending is not None:
            self._end()
        return [fresh]

    def _end(self) -> None:
        self._step("ended")
        self.ahead.clear()

    def _step(self, event: StreamEvent) -> None:
        following = TRANSITIONS[self.state].get(event)
        if following is None:
            raise InvariantBroken(f"{event} in a stream that has {self.state.value}")
        self.state = following


def _rest(new: NewTokens, known: int) -> NewTokens:
    """Without its first `known` tokens."""
    return NewTokens(
        first=new.first + known,
        tokens=new.tokens[known:],
        logprobs=new.logprobs[known:],
        ending=new.ending,
    )
