"""The token log in the store: what workers have emitted for a request, for a gateway that takes it over.

One list a request; every worker appends to it. An entry names its choice, attempt and worker, so that what several workers
write at once stays apart: the entries of one (choice, attempt, worker incarnation) are a *segment*. A segment begins at
index 0 with the tokens that the worker was given, and begins there again after entries were lost.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from common.values.errors import PeerError
from common.values.tokens import Ending, NewTokens, PositionLogprobs

_Segment = tuple[int, int, str]


class LogEntry(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """`writer` is the incarnation of the worker, or of the gateway. `epoch` is that of the request's owner, as the writer knew it."""

    choice: int
    attempt: int
    writer: str
    new: NewTokens
    epoch: int = 1


@dataclass(slots=True, kw_only=True)
class StoredChoice:
    """One choice as far as the log knows it. `logprobs` holds an entry or None for each token."""

    attempt: int
    epoch: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs | None] = field(default_factory=list)
    prompt_logprobs: tuple[PositionLogprobs, ...] | None = None
    ending: Ending | None = None

    def new_tokens(self, *, with_logprobs: bool) -> NewTokens:
        """The choice from index 0 on, as frames carry it. With log-probabilities it is cut where the first one is missing."""
        count = len(self.tokens)
        if with_logprobs:
            count = next((i for i, value in enumerate(self.logprobs) if value is None), count)
        return NewTokens(
            first=0,
            tokens=tuple(self.tokens[:count]),
            logprobs=tuple(value for value in self.logprobs[:count] if value is not None) if with_logprobs else (),
            prompt_logprobs=self.prompt_logprobs,
            ending=self.ending if count == len(self.tokens) else None,
        )


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(LogEntry)


def encode_entry(entry: LogEntry) -> bytes:
    return _encoder.encode(entry)


def decode_entry(data: bytes) -> LogEntry:
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, ValueError, TypeError) as error:
        raise PeerError(f"malformed log entry: {error}") from error


def assemble(entries: Iterable[LogEntry]) -> dict[int, StoredChoice]:
    """By choice: the furthest gapless segment of its highest attempt under its latest owner. A gateway that was taken over from and
    does not know it yet may begin further attempts: they reach nobody, and what its successor wrote is what clients were given.

    Log-probabilities that a segment lacks, because its worker was given the tokens without them, come from others that hold
    the same tokens up to there.
    """
    segments: dict[_Segment, StoredChoice] = {}
    for entry in entries:
        segment = segments.setdefault((entry.choice, entry.attempt, entry.writer), StoredChoice(attempt=entry.attempt))
        _extend(segment, entry)
    best: dict[int, StoredChoice] = {}
    for (choice, _, _), segment in segments.items():
        if choice not in best or _reach(segment) > _reach(best[choice]):
            best[choice] = segment
    for (choice, _, _), segment in segments.items():
        _complete(best[choice], segment)
    return best


def _reach(segment: StoredChoice) -> tuple[int, int, int, bool]:
    return segment.epoch, segment.attempt, len(segment.tokens), segment.ending is not None


def _extend(segment: StoredChoice, entry: LogEntry) -> None:
    new = entry.new
    known = len(segment.tokens) - new.first
    if known < 0 or known > len(new.tokens):
        return  # a gap, until the segment begins again; or a repetition that says less
    segment.epoch = max(segment.epoch, entry.epoch)
    segment.tokens.extend(new.tokens[known:])
    segment.logprobs.extend([None] * (len(segment.tokens) - len(segment.logprobs)))
    end = new.first + len(new.tokens)
    segment.logprobs[end - len(new.logprobs) : end] = new.logprobs
    if new.prompt_logprobs is not None:  # those of a prompt of one token are empty
        segment.prompt_logprobs = new.prompt_logprobs
    segment.ending = new.ending or segment.ending


def _complete(best: StoredChoice, other: StoredChoice) -> None:
    if best.prompt_logprobs is None:
        best.prompt_logprobs = other.prompt_logprobs
    for index, (mine, token) in enumerate(zip(best.tokens, other.tokens, strict=False)):
        if mine != token:
            return
        if best.logprobs[index] is None:
            best.logprobs[index] = other.logprobs[index]
