"""What a worker still has to write to the token log in the store, so that another gateway can take a request over.

The worker's own log is what is written, so nothing is kept twice: a sequence is only marked. After an error, or where the
store came back empty, it is written again from its first token on; whatever else is read, a segment's beginning is there.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from common.protocol.messages import FrameEntry
from common.protocol.stored_log import LogEntry, encode_entry
from common.protocol.token_log import SequenceLog
from common.values.ids import Incarnation, RequestId, SequenceKey
from common.values.tokens import NewTokens

MAX_BATCH = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPart:
    """Of one sequence, for one write."""

    key: SequenceKey
    log: SequenceLog
    new: NewTokens


class TokenLogBacklog:
    """`find` gives the worker's own log of a sequence, None where it is gone: cancelled, or long over."""

    def __init__(self, incarnation: Incarnation, find: Callable[[SequenceKey], SequenceLog | None]) -> None:
        self.counts: Counter[str] = Counter(entries=0, tokens=0, errors=0, restarts=0)
        self._incarnation = incarnation
        self._find = find
        self._new: dict[SequenceKey, None] = {}

    @property
    def is_empty(self) -> bool:
        return not self._new

    def mark(self, entries: Iterable[FrameEntry]) -> None:
        """These tokens have just been emitted."""
        for entry in entries:
            self._new[SequenceKey(RequestId(entry.request_id), entry.choice)] = None

    def take(self) -> list[LogPart]:
        """What is to be written now, bounded; `written` or `failed` is told how that went."""
        parts = []
        for key in list(self._new)[:MAX_BATCH]:
            del self._new[key]
            log = self._find(key)
            new = None if log is None else log.not_stored()
            if log is not None and new is not None:
                parts.append(LogPart(key=key, log=log, new=new))
        return parts

    def entries(self, parts: Iterable[LogPart]) -> dict[RequestId, list[bytes]]:
        """By request, in order."""
        lists: dict[RequestId, list[bytes]] = {}
        for part in parts:
            entry = LogEntry(
                choice=part.key.choice,
                attempt=part.log.attempt,
                writer=self._incarnation,
                new=part.new,
                epoch=part.log.owner.epoch,
            )
            lists.setdefault(part.key.request_id, []).append(encode_entry(entry))
        return lists

    def written(self, parts: Iterable[LogPart], lengths: Mapping[RequestId, int]) -> None:
        """`lengths` of the lists, with what was written."""
        for part in parts:
            self.counts["entries"] += 1
            self.counts["tokens"] += len(part.new.tokens)
            part.log.stored_tokens = part.new.first + len(part.new.tokens)
            part.log.stored_entries += 1
            if lengths[part.key.request_id] < part.log.stored_entries:  # the list is younger than what was written to it
                self.counts["restarts"] += 1
                self._begin_again(part)

    def failed(self, parts: Iterable[LogPart]) -> None:
        """Any of it may have been written."""
        self.counts["errors"] += 1
        for part in parts:
            self._begin_again(part)

    def _begin_again(self, part: LogPart) -> None:
        part.log.stored_tokens = part.log.stored_entries = 0
        self._new[part.key] = None
