"""Silent and broken streams are probed: a replay request asks for what is missing, and its answer, or that there is none,
tells whether the worker still has the sequence.

Silence counts only while the broker itself answers.
"""

from collections.abc import Iterable, Sequence

from common.mesh.gateway_attempts import GatewayAttempts
from common.mesh.gateway_effects import SendReplay
from common.mesh.gateway_ledger import GatewayLedger
from common.mesh.gateway_request import GatewayRequest
from common.mesh.gateway_streams import GatewayStreams
from common.policy.watchdog import SUSPECT_FACTOR, question_s
from common.protocol.messages import ReplayEntry, ReplayItem
from common.protocol.token_stream import TokenStream
from common.values.errors import BrokerUnavailable
from common.values.ids import Incarnation, RequestId, WorkerId

GAP_S = 0.05
MAX_ITEMS = 1024
"""Of one replay request: a page stays below the broker's message limit."""
MAX_UNANSWERED = 30
"""Questions that a worker which is heard otherwise may leave open: they do not reach it."""


class GatewayProbes:
    def __init__(self, ledger: GatewayLedger, attempts: GatewayAttempts, streams: GatewayStreams) -> None:
        self._ledger = ledger
        self._attempts = attempts
        self._streams = streams
        self._due: dict[WorkerId, list[ReplayItem]] = {}

    def look_at(self, request: GatewayRequest, now: float) -> None:
        """Note which of its streams are to be asked for; `ask` sends that."""
        for stream in request.unfinished():
            if self._needs_probe(request, stream, now):
                request.asked.add(stream.choice)
                self._due.setdefault(request.source[stream.choice], []).append(_item(request, stream))

    def ask(self, now: float) -> None:
        due, self._due = self._due, {}
        for worker, items in due.items():
            for first in range(0, len(items), MAX_ITEMS):
                self._ledger.counters["probes"] += 1
                page = tuple(items[first : first + MAX_ITEMS])
                within_s = question_s(self._ledger.bounds(worker), silent_s=self._ledger.registry.silence(worker, now))
                self._ledger.emit(SendReplay(worker=worker, items=page, within_s=within_s))

    def on_answer(
        self,
        worker: WorkerId,
        items: Sequence[ReplayItem],
        entries: Iterable[ReplayEntry] | None,
        now: float,
        *,
        broker_alive: bool,
        incarnation: Incarnation | None,
    ) -> None:
        for item in items:
            request = self._ledger.current(RequestId(item.request_id), item.attempt)
            if request is not None:
                request.asked.discard(item.choice)
        if entries is None:
            if not broker_alive:
                self._ledger.registry.refresh(now)
            for request_id, attempt in sorted({(RequestId(i.request_id), i.attempt) for i in items}):
                self._not_answered(request_id, attempt, worker, now, broker_alive=broker_alive)
            return
        self._ledger.registry.heard(worker, now)
        for entry in entries:
            request = self._ledger.current(RequestId(entry.request_id), entry.attempt)
            if request is not None and entry.choice in request.streams:
                self._on_entry(request, worker, entry, now, incarnation)

    def _needs_probe(self, request: GatewayRequest, stream: TokenStream, now: float) -> bool:
        if stream.choice in request.asked:
            return False
        silent = now - request.heard_at[stream.choice]
        if stream.has_gap:
            return silent > GAP_S
        return silent > self._ledger.bounds(request.source[stream.choice]).probe_after_s

    def _on_entry(
        self, request: GatewayRequest, worker: WorkerId, entry: ReplayEntry, now: float, incarnation: Incarnation | None
    ) -> None:
        request.unanswered.pop(worker, None)
        stream = request.streams[entry.choice]
        if stream.ended:
            return
        if entry.state == "adopted":
            self._attempts.drop(request, now)
            return
        if entry.state == "unknown":
            if request.source[entry.choice] == worker:
                self._ledger.counters["unknown"] += 1
                died = incarnation is not None and request.incarnations.get(worker, incarnation) != incarnation
                self._attempts.raise_attempt(request, now, lost=worker if died else None, full=None)
            return
        self._attempts.accept(request, worker)
        if entry.new is not None:
            self._streams.take(request, entry.choice, worker, entry.new, now)
        if entry.state == "moved" and entry.moved_to is not None:
            if not stream.ended:
                self._streams.follow(request, entry.choice, worker, WorkerId(entry.moved_to))  # asked next, if still silent
        else:
            request.heard_at[entry.choice] = now

    def _not_answered(self, request_id: RequestId, attempt: int, worker: WorkerId, now: float, *, broker_alive: bool) -> None:
        request = self._ledger.current(request_id, attempt)
        if request is None:
            return
        if not broker_alive and not request.accepted:
            self._attempts.fail(request, BrokerUnavailable("the message broker does not answer"), now)
            return
        if not broker_alive:
            request.heard_at = dict.fromkeys(request.heard_at, now)
            request.unanswered.clear()
            return
        request.unanswered[worker] += 1
        if self._is_lost(request, worker, now):
            self._attempts.raise_attempt(request, now, lost=worker, full=None)
            for other in self._ledger.following(worker):
                if self._is_lost(other, worker, now):
                    self._attempts.raise_attempt(other, now, lost=worker, full=None)
        elif request.unanswered[worker] >= MAX_UNANSWERED:
            self._attempts.raise_attempt(request, now, lost=worker, full=None)

    def _is_lost(self, request: GatewayRequest, worker: WorkerId, now: float) -> bool:
        """Not heard in any way for its bound; a question has just gone unanswered while the broker answers."""
        factor = SUSPECT_FACTOR if request.suspicion.is_announced_at(worker) else 1.0
        return self._ledger.registry.silence(worker, now) > factor * self._ledger.bounds(worker).lost_after_s


def _item(request: GatewayRequest, stream: TokenStream) -> ReplayItem:
    return ReplayItem(
        request_id=request.request_id,
        choice=stream.choice,
        attempt=request.attempt,
        next_index=stream.next_index,
        epoch=request.epoch,
    )
