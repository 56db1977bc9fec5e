"""Who emitted what, seen from outside: within an attempt each index leaves once, whoever emits; the choices of a request decode
on one worker; nothing leaves a worker after it has handled the cancel."""

from collections.abc import Callable, Iterable

from common.protocol.messages import Cancel, FrameEntry
from common.protocol.token_log import SequenceLog
from common.values.errors import InvariantBroken
from common.values.ids import Owner, RequestId, SequenceKey, WorkerId

_Stream = tuple[str, int, int, Owner | None]
_LogOf = Callable[[SequenceKey], SequenceLog | None]


class EmissionLedger:
    """One per world. Not `exact`: a dispatch that arrives twice may run twice, and its tokens then leave twice. An attempt is
    one owner's: two lives of gateways that own a request one after the other may give the same number to two placements.
    `settled`: no worker leaves or takes another role (either moves what decodes there, one choice after the other), so that
    nothing moves once it decodes."""

    def __init__(self, *, exact: bool, settled: bool) -> None:
        self._exact = exact
        self._settled = settled
        self._next: dict[_Stream, int] = {}
        self._decodes: dict[tuple[str, int, Owner | None], WorkerId] = {}
        self._cancelled: dict[tuple[WorkerId, int, str], dict[int | None, int]] = {}

    def cancelled(self, worker: WorkerId, life: int, cancel: Cancel) -> None:
        floors = self._cancelled.setdefault((worker, life, cancel.request_id), {})
        for choice in (None,) if cancel.choices is None else cancel.choices:
            floors[choice] = max(cancel.attempt, floors.get(choice, 0))

    def emitted(self, worker: WorkerId, life: int, log_of: _LogOf, entries: Iterable[FrameEntry]) -> None:
        for entry in entries:
            floors = self._cancelled.get((worker, life, entry.request_id), {})
            if entry.attempt <= max(floors.get(None, 0), floors.get(entry.choice, 0)):
                raise InvariantBroken(f"{worker} emits {entry.request_id} after it was cancelled there")
            if self._exact:
                log = log_of(SequenceKey(RequestId(entry.request_id), entry.choice))
                self._check_once(worker, None if log is None else log.owner, entry)

    def _check_once(self, worker: WorkerId, owner: Owner | None, entry: FrameEntry) -> None:
        stream = (entry.request_id, entry.choice, entry.attempt, owner)
        following = self._next.get(stream, entry.new.first)
        if entry.new.first != following:
            raise InvariantBroken(f"{worker} emits index {entry.new.first} of {stream}, {following} is next")
        if self._settled and stream in self._next and entry.new.tokens:
            place = self._decodes.setdefault((entry.request_id, entry.attempt, owner), worker)
            if place != worker:
                raise InvariantBroken(f"{worker} decodes a choice of {stream}, of which others decode at {place}")
        self._next[stream] = following + len(entry.new.tokens)
