"""A gateway as a pure machine: it owns requests, places them, follows their tokens, and places them again when a worker
is lost.

Events are method calls that take `now`; effects are collected for the shell. Fencing is by attempt: one placement, one
number; whatever carries a lower one is dropped. A silent or broken stream is probed (a replay request is the probe).
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from common.mesh.cancel_memory import CancelMemory
from common.mesh.gateway_effects import (
    Accepted,
    AskCache,
    Deliver,
    Dropped,
    Ended,
    GatewayEffect,
    SendCancel,
    SendDispatch,
    SendReplay,
)
from common.mesh.gateway_request import GatewayRequest
from common.mesh.worker_registry import WorkerRegistry
from common.policy.routing import place
from common.policy.watchdog import SUSPECT_FACTOR
from common.protocol.messages import (
    Cancel,
    ChoiceState,
    Dispatch,
    DispatchReply,
    FrameEntry,
    ReplayEntry,
    ReplayItem,
    SequenceNotice,
    Snapshot,
    TokenFrame,
    pack_ids,
)
from common.protocol.token_stream import TokenStream
from common.values.errors import (
    BrokerUnavailable,
    ContextTooLong,
    InvalidRequest,
    NeverFits,
    Overloaded,
    RequestError,
    RequestFailed,
    SegueError,
    Unavailable,
)
from common.values.ids import GatewayId, Incarnation, ModelKey, RequestId, WorkerId
from common.values.sampling import SamplingParameters
from common.values.slo import Slo
from common.values.tokens import DEADLINE_CODE, NewTokens

GAP_S = 0.05
MAX_RAISES = 64
PATIENCE_S = 30.0
FULL_RETRY_S = 0.25
"""How long a running request waits before it asks again, where every worker's queue is full."""
MAX_ITEMS = 1024
"""Of one replay request: a page stays below the broker's message limit."""
MAX_UNANSWERED = 30
"""Questions that a worker which is heard otherwise may leave open: they do not reach it."""
_REFUSALS: dict[str, type[InvalidRequest | ContextTooLong | NeverFits | Unavailable]] = {
    "unavailable": Unavailable,
    "context_length_exceeded": ContextTooLong,
    "kv_cache_too_small": NeverFits,
}


class GatewayCore:
    """One per gateway process."""

    def __init__(
        self, *, gateway: GatewayId, incarnation: Incarnation, slo: Slo | None = None, strays_from: float = -math.inf
    ) -> None:
        """Before `strays_from` frames may come that a gateway of this id asked for which has died: its requests are adopted,
        or their workers end them."""
        self.registry = WorkerRegistry()
        self.counters: Counter[str] = Counter()
        self._slo = slo if slo is not None else Slo()
        self._gateway = gateway
        self._incarnation = incarnation
        self._requests: dict[RequestId, GatewayRequest] = {}
        self._cancels = CancelMemory()
        self._strays_from = strays_from
        self._effects: list[GatewayEffect] = []

    def take_effects(self) -> list[GatewayEffect]:
        effects = list(self._effects)
        self._effects.clear()
        return effects

    @property
    def active(self) -> int:
        return len(self._requests)

    def longest_silence_s(self) -> float:
        """The present bound: a worker that is silent for longer is taken for lost."""
        return max((self.registry.bounds(s.worker, self._slo).lost_after_s for s in self.registry.all()), default=0.0)

    def active_ids(self) -> list[RequestId]:
        return list(self._requests)

    def get_timer(self, now: float) -> float | None:
        """When `on_tick` is due; None while nothing runs."""
        return now + GAP_S if self._requests else None

    # ------------------------------------------------------------------ the client's events

    def start(
        self,
        *,
        request_id: RequestId,
        model: ModelKey,
        prompt: tuple[int, ...],
        sampling: SamplingParameters,
        choices: int,
        salt: bytes,
        deadline: float | None,
        now: float,
    ) -> None:
        """Place a request. Raises Unavailable where no worker of the model is ready."""
        if not any(s.state == "ready" for s in self.registry.group(model)):
            raise Unavailable(f"no worker that serves {model.name} is ready", retry_after_s=2.0)
        request = GatewayRequest(
            request_id=request_id,
            model=model,
            prompt=prompt,
            sampling=sampling,
            salt=salt,
            streams={choice: TokenStream(choice=choice) for choice in range(choices)},
            deadline=deadline,
        )
        self._requests[request_id] = request
        self._place(request, now)

    def adopt(self, request: GatewayRequest, logged: Mapping[int, NewTokens], now: float) -> None:
        """Go on with another gateway's request. What its log holds is delivered first; then its workers are probed with our
        higher epoch, which turns their frames to us, and what was lost with a worker is placed again."""
        self._requests[request.request_id] = request
        self.counters["adopted"] += 1
        for choice, known in logged.items():
            for new in request.streams[choice].accept(request.attempt, known):
                self._effects.append(Deliver(request_id=request.request_id, choice=choice, new=new))
        if not request.unfinished():
            self._end(request, None)
        elif not request.answered:
            self._place(request, now)

    def drop(self, request_id: RequestId, now: float) -> None:
        """Another gateway owns this now: forget it, and leave its sequences alone."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        self.counters["dropped"] += 1
        for worker in request.involved:
            self._cancels.told(request_id, worker, now, epoch=request.epoch)
        self._cancels.over(request_id)
        self._effects.append(Dropped(request_id=request_id))

    def cancel(self, request_id: RequestId, choice: int | None, now: float) -> None:
        """The client left, or a stop string was matched: nothing more of it is wanted."""
        request = self._requests.get(request_id)
        if request is None:
            return
        if choice is not None and choice in request.streams:
            request.streams[choice].ended = True
        if choice is None or not request.unfinished():
            self._cancel_workers(request, None, now)
            self._end(request, None)
        else:
            self._cancel_workers(request, [choice], now)

    def abort(self, request_id: RequestId, attempt: int, error: SegueError, now: float) -> None:
        """The dispatch could not be sent: a new request is turned away, one that runs already waits for its probe, unless
        sending it again would fail again."""
        request = self._current(request_id, attempt)
        if request is None:
            return
        if request.accepted and not isinstance(error, RequestError):
            request.answered = True
        else:
            self._fail(request, error, now)

    # ------------------------------------------------------------------ the mesh's events

    def on_snapshot(self, message: Snapshot, now: float) -> None:
        if message.gone:
            self._notice_farewell(message.snapshot.worker, message.snapshot.incarnation, now)
        else:
            self._notice_restart(message.snapshot.worker, message.snapshot.incarnation)
        self.registry.observe(message.snapshot, now, gone=message.gone)
        if self.registry.observe_cache(message.snapshot, message.cache, now):
            self._effects.append(AskCache(worker=message.snapshot.worker))
        for request in list(self._requests.values()):
            if request.retry_at is not None and now >= request.retry_at:
                self._place(request, now)

    def on_dispatch_answer(
        self, request_id: RequestId, attempt: int, worker: WorkerId, reply: DispatchReply | None, now: float
    ) -> None:
        """`reply` is None where none came in time: the worker is probed."""
        request = self._current(request_id, attempt)
        if request is None or request.answered:
            return
        request.answered = True
        if reply is None:
            request.unanswered[worker] += 1
            request.heard_at = dict.fromkeys(request.heard_at, -math.inf)
            return
        match reply.verdict:
            case "accepted":
                self._accept(request, worker)
            case "full" | "stale":
                self.counters[f"dispatch_{reply.verdict}"] += 1
                self._raise_attempt(request, now, lost=None, full=worker)
            case "refused":
                self._refused(request, worker, reply, now)

    def on_frame(self, frame: TokenFrame, now: float) -> None:
        worker = WorkerId(frame.worker)
        self.registry.heard(worker, now)
        for notice in frame.notices:
            self._on_notice(worker, Incarnation(frame.incarnation), notice, now)
        for entry in frame.entries:
            request = self._requests.get(RequestId(entry.request_id))
            if request is None or entry.attempt < request.attempt:
                self._cancel_stray(worker, entry, None, now)
            elif entry.attempt == request.attempt and entry.choice in request.streams:
                request.involve(worker, Incarnation(frame.incarnation))
                self._accept(request, worker)
                if request.streams[entry.choice].ended:
                    self._cancel_stray(worker, entry, [entry.choice], now)
                else:
                    self._take(request, entry.choice, worker, entry.new, now)

    def on_replay_answer(
        self,
        worker: WorkerId,
        items: Sequence[ReplayItem],
        entries: Iterable[ReplayEntry] | None,
        now: float,
        *,
        broker_alive: bool,
        incarnation: Incarnation | None = None,
    ) -> None:
        """`entries` is None where no answer came; that counts only while the broker itself answers. `incarnation` is that of
        the worker that answered, where it is known."""
        for item in items:
            request = self._current(RequestId(item.request_id), item.attempt)
            if request is not None:
                request.asked.discard(item.choice)
        if entries is None:
            if not broker_alive:
                self.registry.refresh(now)
            for request_id, attempt in sorted({(RequestId(i.request_id), i.attempt) for i in items}):
                self._not_answered(request_id, attempt, worker, now, broker_alive=broker_alive)
            return
        self.registry.heard(worker, now)
        for entry in entries:
            request = self._current(RequestId(entry.request_id), entry.attempt)
            if request is not None and entry.choice in request.streams:
                self._on_replay_entry(request, worker, entry, now, incarnation)

    def on_tick(self, now: float) -> None:
        """Every 50 ms while requests run: gaps and silences are probed, deadlines kept."""
        self.registry.expire(now)
        asked: dict[WorkerId, list[ReplayItem]] = {}
        for request in list(self._requests.values()):
            if request.deadline is not None and now > request.deadline:
                self._fail(request, _deadline_passed(), now)
            elif request.retry_at is not None:
                if now >= request.retry_at:
                    self._place(request, now)
            elif request.answered:
                for stream in request.unfinished():
                    if self._needs_probe(request, stream, now):
                        request.asked.add(stream.choice)
                        asked.setdefault(request.source[stream.choice], []).append(_item(request, stream))
        for worker, items in asked.items():
            for first in range(0, len(items), MAX_ITEMS):
                self.counters["probes"] += 1
                page = tuple(items[first : first + MAX_ITEMS])
                within_s = self.registry.bounds(worker, self._slo).answer_within_s
                self._effects.append(SendReplay(worker=worker, items=page, within_s=within_s))

    # ------------------------------------------------------------------ private

    def _current(self, request_id: RequestId, attempt: int) -> GatewayRequest | None:
        request = self._requests.get(request_id)
        return request if request is not None and request.attempt == attempt else None

    def _place(self, request: GatewayRequest, now: float) -> None:
        unfinished = request.unfinished()
        needs_decode = any(len(s.tokens) + 1 < request.sampling.max_tokens for s in unfinished)
        cached = self.registry.cached_tokens(request.model, request.prompt, request.salt)
        placement = place(
            self.registry.group(request.model),
            self.registry.pending,
            prompt_tokens=len(request.prompt) + max(len(s.tokens) for s in unfinished),
            needs_decode=needs_decode,
            avoid=request.avoid,
            cached=cached,
        )
        if placement is None:
            self._wait(request, now, Unavailable(f"no worker that serves {request.model.name} is left"), retry_s=0.0)
            return
        request.retry_at = None
        request.attempt += 1
        request.worker = placement.worker
        request.answered = False
        request.unanswered.clear()
        request.asked.clear()
        request.involved = set()
        request.incarnations.clear()
        request.suspicion.placed_again()
        for worker in (placement.worker, placement.decode):
            snapshot = None if worker is None else self.registry.get(worker)
            if worker is not None:
                request.involve(worker, None if snapshot is None else snapshot.incarnation)
        for stream in unfinished:
            stream.raise_attempt(request.attempt)
            request.source[stream.choice] = placement.worker
            request.heard_at[stream.choice] = now
        to_compute = len(request.prompt) - cached.get(placement.worker, 0)
        self.registry.dispatched(placement.worker, to_compute, 0 if placement.decode else len(unfinished))
        if placement.decode is not None:
            self.registry.dispatched(placement.decode, 0, len(unfinished))
        dispatch = self._dispatch(request, placement.decode, now)
        within_s = self.registry.bounds(placement.worker, self._slo).lost_after_s
        self._effects.append(SendDispatch(worker=placement.worker, dispatch=dispatch, within_s=within_s))

    def _dispatch(self, request: GatewayRequest, decode: WorkerId | None, now: float) -> Dispatch:
        return Dispatch(
            request_id=request.request_id,
            attempt=request.attempt,
            gateway=self._gateway,
            incarnation=self._incarnation,
            epoch=request.epoch,
            model=request.model,
            prompt=pack_ids(request.prompt),
            choices=[ChoiceState(choice=s.choice, tokens=list(s.tokens)) for s in request.unfinished()],
            sampling=request.sampling,
            decode_worker=decode,
            salt=request.salt,
            remaining_s=None if request.deadline is None else max(0.0, request.deadline - now),
            suspect=bool(request.suspicion.choices),
        )

    def _wait(self, request: GatewayRequest, now: float, error: SegueError, *, retry_s: float) -> None:
        """Nobody takes the request now: try again later, within one patience for the whole of the waiting."""
        request.waits_since = now if request.waits_since is None else request.waits_since
        request.retry_at = now + retry_s
        if now - request.waits_since > PATIENCE_S:
            self._fail(request, error, now)

    def _accept(self, request: GatewayRequest, worker: WorkerId) -> None:
        request.answered = True
        request.unanswered.pop(worker, None)
        request.waits_since = None
        if not request.accepted:
            request.accepted = True
            self._effects.append(Accepted(request_id=request.request_id))

    def _refused(self, request: GatewayRequest, worker: WorkerId, reply: DispatchReply, now: float) -> None:
        """A new request is not for this mesh. One that ran elsewhere before may still fit another worker. A worker that serves
        another model than we knew is forgotten until it is heard again."""
        if reply.code == "wrong_model":
            self.counters["wrong_model"] += 1
            self.registry.forget(worker)
            self._raise_attempt(request, now, lost=None, full=None)
            return
        if request.accepted and worker not in request.avoid:
            self._raise_attempt(request, now, lost=None, full=worker)
            return
        self._fail(request, _REFUSALS.get(reply.code, InvalidRequest)(reply.message), now)

    def _take(self, request: GatewayRequest, choice: int, worker: WorkerId, new: NewTokens, now: float) -> None:
        stream = request.streams[choice]
        if _lacks_scores(request, stream, new):
            self.counters["scores_lost"] += 1
            self._raise_attempt(request, now, lost=None, full=None)
            return
        had_gap = stream.has_gap
        delivered = stream.accept(request.attempt, new)
        if not delivered:
            if stream.has_gap and not had_gap:
                request.heard_at[choice] = now  # what is missing may be just behind
            return
        request.source[choice] = worker
        request.heard_at[choice] = now
        request.raises = 0
        request.suspicion.token_came(worker, choice)
        request.avoid.clear()
        overdue = delivered[-1].ending is not None and delivered[-1].ending.error_code == DEADLINE_CODE
        if overdue:
            last = delivered.pop()
            delivered += [replace(last, ending=None)] if last.tokens else []
        for fresh in delivered:
            self._effects.append(Deliver(request_id=request.request_id, choice=choice, new=fresh))
        if overdue:
            self._fail(request, _deadline_passed(), now)
        elif not request.unfinished():
            self._end(request, None)

    def _needs_probe(self, request: GatewayRequest, stream: TokenStream, now: float) -> bool:
        if stream.choice in request.asked:
            return False
        silent = now - request.heard_at[stream.choice]
        if stream.has_gap:
            return silent > GAP_S
        return silent > self.registry.bounds(request.source[stream.choice], self._slo).probe_after_s

    def _on_replay_entry(
        self, request: GatewayRequest, worker: WorkerId, entry: ReplayEntry, now: float, incarnation: Incarnation | None
    ) -> None:
        request.unanswered.pop(worker, None)
        stream = request.streams[entry.choice]
        if stream.ended:
            return
        if entry.state == "adopted":
            self.drop(request.request_id, now)
            return
        if entry.state == "unknown":
            if request.source[entry.choice] == worker:
                self.counters["unknown"] += 1
                died = incarnation is not None and request.incarnations.get(worker, incarnation) != incarnation
                self._raise_attempt(request, now, lost=worker if died else None, full=None)
            return
        self._accept(request, worker)
        request.heard_at[entry.choice] = now
        if entry.new is not None:
            self._take(request, entry.choice, worker, entry.new, now)
        if entry.state == "moved" and entry.moved_to is not None and not stream.ended:
            self._follow(request, entry.choice, worker, WorkerId(entry.moved_to))

    def _follow(self, request: GatewayRequest, choice: int, worker: WorkerId, target: WorkerId) -> None:
        """A choice has moved from one worker to another."""
        snapshot = self.registry.get(target)
        request.involve(target, None if snapshot is None else snapshot.incarnation)
        if request.source[choice] == worker:
            request.source[choice] = target

    def _not_answered(self, request_id: RequestId, attempt: int, worker: WorkerId, now: float, *, broker_alive: bool) -> None:
        request = self._current(request_id, attempt)
        if request is None:
            return
        if not broker_alive and not request.accepted:
            self._fail(request, BrokerUnavailable("the message broker does not answer"), now)
            return
        if not broker_alive:
            request.heard_at = dict.fromkeys(request.heard_at, now)
            request.unanswered.clear()
            return
        request.unanswered[worker] += 1
        if self._is_lost(request, worker, now):
            self._raise_attempt(request, now, lost=worker, full=None)
            for other in list(self._requests.values()):
                follows = any(other.source[stream.choice] == worker for stream in other.unfinished())
                if follows and self._is_lost(other, worker, now):
                    self._raise_attempt(other, now, lost=worker, full=None)
        elif request.unanswered[worker] >= MAX_UNANSWERED:
            self._raise_attempt(request, now, lost=worker, full=None)

    def _is_lost(self, request: GatewayRequest, worker: WorkerId, now: float) -> bool:
        """Not heard in any way for its bound; a question has just gone unanswered while the broker answers."""
        factor = SUSPECT_FACTOR if request.suspicion.is_announced_at(worker) else 1.0
        return self.registry.silence(worker, now) > factor * self.registry.bounds(worker, self._slo).lost_after_s

    def _notice_restart(self, worker: WorkerId, incarnation: Incarnation) -> None:
        """A worker that speaks as a new incarnation has lost what the old one had: ask at once."""
        known = self.registry.get(worker)
        if known is not None and known.incarnation == incarnation:
            return
        for request in list(self._requests.values()):
            had = request.incarnations.get(worker)
            follows = any(request.source[stream.choice] == worker for stream in request.unfinished())
            if had is not None and had != incarnation and follows:
                request.heard_at = dict.fromkeys(request.heard_at, -math.inf)

    def _notice_farewell(self, worker: WorkerId, incarnation: Incarnation, now: float) -> None:
        """What a worker had not finished when it left is placed again; nothing was lost by that."""
        for request in list(self._requests.values()):
            follows = any(request.source[stream.choice] == worker for stream in request.unfinished())
            if follows and request.incarnations.get(worker) == incarnation:
                request.avoid.add(worker)
                self._raise_attempt(request, now, lost=None, full=None)

    def _on_notice(self, worker: WorkerId, incarnation: Incarnation, notice: SequenceNotice, now: float) -> None:
        request = self._current(RequestId(notice.request_id), notice.attempt)
        if request is None or notice.choice not in request.streams:
            return
        request.involve(worker, incarnation)
        match notice.kind:
            case "suspect":
                self.counters["suspects_announced"] += 1
                request.suspicion.announce(worker, notice.choice)
            case "cleared":
                request.suspicion.clear(worker, notice.choice)
            case "moved" if notice.moved_to is not None:
                request.heard_at[notice.choice] = now
                self._follow(request, notice.choice, worker, WorkerId(notice.moved_to))
            case "handed_back":
                self.counters["handed_back"] += 1
                request.avoid.add(worker)
                self._raise_attempt(request, now, lost=None, full=None)
            case _:
                pass

    def _raise_attempt(self, request: GatewayRequest, now: float, *, lost: WorkerId | None, full: WorkerId | None) -> None:
        """A lost worker is forgotten until it is heard again, and its sequences are suspects. A worker without room is no
        fault of anybody: a new request is turned away once all have refused, a running one asks again later."""
        if request.retry_at is not None:
            return
        self._cancel_workers(request, None, now)
        if full is not None:
            self._refused_by(request, full, now)
            return
        request.raises += 1
        poison = False
        if lost is not None:
            self.counters["workers_lost"] += 1
            poison = request.suspicion.worker_lost(lost, [stream.choice for stream in request.unfinished()])
            request.avoid.add(lost)
            self.registry.forget(lost)
        if poison:
            self.counters["requests_poisoned"] += 1
            message = "two workers in a row were lost while they ran this request: it is not tried on a third"
            self._fail(request, RequestFailed(message, code="request_poisoned", status=502), now)
        elif request.raises >= MAX_RAISES:
            self._fail(request, Unavailable("the mesh could not place this request"), now)
        else:
            self._place(request, now)

    def _refused_by(self, request: GatewayRequest, full: WorkerId, now: float) -> None:
        if full not in request.avoid:
            request.avoid.add(full)
            self._place(request, now)
            return
        error = Overloaded("every worker's queue is full", retry_after_s=1.0)
        if request.accepted:
            request.avoid.clear()
            self._wait(request, now, error, retry_s=FULL_RETRY_S)
        else:
            self._fail(request, error, now)

    def _cancel_workers(self, request: GatewayRequest, choices: list[int] | None, now: float) -> None:
        cancel = Cancel(request_id=request.request_id, attempt=request.attempt, choices=choices, epoch=request.epoch)
        for worker in sorted(request.involved):
            self._send_cancel(worker, cancel, now)

    def _send_cancel(self, worker: WorkerId, cancel: Cancel, now: float) -> None:
        self._cancels.told(RequestId(cancel.request_id), worker, now, epoch=cancel.epoch)
        self._effects.append(SendCancel(worker=worker, cancel=cancel))

    def _cancel_stray(self, worker: WorkerId, entry: FrameEntry, choices: list[int] | None, now: float) -> None:
        """A frame of a dead attempt, or of what is over: its sequence should not run. Where the worker was told just now,
        or the sequence has ended there, that is no surprise."""
        if entry.new.ending is not None or not self._cancels.is_due(RequestId(entry.request_id), worker, now):
            return
        request = self._requests.get(RequestId(entry.request_id))
        if request is None and now < self._strays_from and not self._cancels.was_ours(RequestId(entry.request_id)):
            return
        self.counters["stray_frames"] += 1
        epoch = self._cancels.epoch(RequestId(entry.request_id), worker) if request is None else request.epoch
        self._send_cancel(worker, Cancel(request_id=entry.request_id, attempt=entry.attempt, choices=choices, epoch=epoch), now)

    def _fail(self, request: GatewayRequest, error: SegueError, now: float) -> None:
        self._cancel_workers(request, None, now)
        self._end(request, error)

    def _end(self, request: GatewayRequest, error: SegueError | None) -> None:
        del self._requests[request.request_id]
        self._cancels.over(request.request_id)
        self._effects.append(Ended(request_id=request.request_id, error=error))


def _lacks_scores(request: GatewayRequest, stream: TokenStream, new: NewTokens) -> bool:
    """A worker that was given tokens does not know their log-probabilities. Where who adopts the request finds them nowhere
    else, they are computed again."""
    if not new.tokens or new.first + len(new.tokens) <= stream.next_index or new.first > stream.next_index:
        return False
    is_start = stream.choice == 0 and stream.next_index == 0
    lacks_prompt = is_start and request.sampling.prompt_logprobs is not None and new.prompt_logprobs is None
    return lacks_prompt or (request.sampling.logprobs is not None and len(new.logprobs) < len(new.tokens))


def _deadline_passed() -> RequestFailed:
    return RequestFailed("the request's deadline has passed", code=DEADLINE_CODE, status=504)


def _item(request: GatewayRequest, stream: TokenStream) -> ReplayItem:
    return ReplayItem(
        request_id=request.request_id,
        choice=stream.choice,
        attempt=request.attempt,
        next_index=stream.next_index,
        epoch=request.epoch,
    )
