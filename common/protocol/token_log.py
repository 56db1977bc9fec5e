"""What a worker has emitted, by sequence: the answer to replays and probes.

A log starts at index 0 with the tokens that the worker was given, and is kept until 120 s after the end.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from common.protocol.messages import SequenceState
from common.values.ids import Owner, RequestId, SequenceKey, WorkerId
from common.values.tokens import Ending, NewTokens, PositionLogprobs

KEEP_S = 120.0
MAX_ENDED = 16384


@dataclass(slots=True, kw_only=True)
class SequenceLog:
    """`logprobs` is empty, or covers the tokens from index `given` on: tokens that a worker was given carry none.

    `stored_tokens` and `stored_entries` say how far the log in the store has come.
    """

    owner: Owner
    attempt: int
    given: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[PositionLogprobs, ...] | None = None
    ending: Ending | None = None
    state: SequenceState = "queued"
    moved_to: WorkerId | None = None
    over_at: float | None = None
    stored_tokens: int = 0
    stored_entries: int = 0

    def take_owner(self, owner: Owner) -> None:
        """A gateway of a higher epoch has taken the request over; others change nothing."""
        if owner.epoch > self.owner.epoch:
            self.owner = owner

    def since(self, index: int) -> NewTokens | None:
        """What was emitted from `index` on; None where that is nothing."""
        if index >= len(self.tokens) and self.ending is None:
            return None
        return NewTokens(
            first=min(index, len(self.tokens)),
            tokens=tuple(self.tokens[index:]),
            logprobs=tuple(self.logprobs[index - self.given :]) if index >= self.given else (),
            prompt_logprobs=self.prompt_logprobs if index == 0 else None,
            ending=self.ending,
        )

    def not_stored(self) -> NewTokens | None:
        """What the store lacks; None where that is nothing. Log-probabilities are those of the last tokens."""
        first = self.stored_tokens
        if first >= len(self.tokens) and self.ending is None:
            return None
        return NewTokens(
            first=first,
            tokens=tuple(self.tokens[first:]),
            logprobs=tuple(self.logprobs[max(0, first - self.given) :]),
            prompt_logprobs=self.prompt_logprobs if first == 0 else None,
            ending=self.ending,
        )

    def whole(self) -> NewTokens:
        """All tokens so far, for a hand-off; the log-probabilities are those of the last ones."""
        return NewTokens(first=0, tokens=tuple(self.tokens), logprobs=tuple(self.logprobs), prompt_logprobs=self.prompt_logprobs)

    def restart(self, new: NewTokens) -> None:
        """A hand-off brings `whole` of the sender's log."""
        self.tokens = list(new.tokens)
        self.given = len(new.tokens) - len(new.logprobs)
        self.logprobs = list(new.logprobs)
        self.prompt_logprobs = new.prompt_logprobs

    def append(self, new: NewTokens) -> None:
        self.tokens.extend(new.tokens)
        self.logprobs.extend(new.logprobs)
        if new.prompt_logprobs is not None:  # those of a prompt of one token are empty
            self.prompt_logprobs = new.prompt_logprobs
        self.ending = new.ending


class TokenLogs:
    """One log a sequence: that of its highest attempt here."""

    def __init__(self) -> None:
        self._logs: dict[SequenceKey, SequenceLog] = {}
        self._keys: dict[RequestId, set[SequenceKey]] = {}
        self._over: OrderedDict[SequenceKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._logs)

    def get(self, key: SequenceKey) -> SequenceLog | None:
        return self._logs.get(key)

    def of_request(self, request: RequestId) -> list[tuple[SequenceKey, SequenceLog]]:
        return [(key, self._logs[key]) for key in sorted(self._keys.get(request, ()))]

    def open(self, key: SequenceKey, log: SequenceLog) -> SequenceLog:
        self._over.pop(key, None)
        self._keys.setdefault(key.request_id, set()).add(key)
        self._logs[key] = log
        return log

    def close(self, key: SequenceKey, state: SequenceState, now: float, *, moved_to: WorkerId | None = None) -> None:
        log = self._logs[key]
        log.state, log.moved_to, log.over_at = state, moved_to, now
        self._over[key] = None
        self._over.move_to_end(key)

    def forget(self, key: SequenceKey) -> None:
        """The sequence was cancelled or replaced: nobody will ask."""
        if self._logs.pop(key, None) is None:
            return
        self._over.pop(key, None)
        keys = self._keys[key.request_id]
        keys.discard(key)
        if not keys:
            del self._keys[key.request_id]

    def expire(self, now: float) -> None:
        while self._over:
            key = next(iter(self._over))
            over_at = self._logs[key].over_at
            if len(self._over) <= MAX_ENDED and over_at is not None and over_at + KEEP_S > now:
                return
            self.forget(key)
