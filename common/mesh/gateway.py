"""A gateway as a pure machine: it owns requests, places them, follows their tokens, and places them again when a worker
is lost.

Events are method calls that take `now`; effects are collected for the shell. Fencing is by attempt: one placement, one
number; whatever carries a lower one is dropped. A silent or broken stream is probed (a replay request is the probe).
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from common.mesh.arrival_ledger import ArrivalLedger
from common.mesh.gateway_attempts import GatewayAttempts
from common.mesh.gateway_cancels import GatewayCancels
from common.mesh.gateway_effects import (
    AskCache,
    Deliver,
    GatewayEffect,
)
from common.mesh.gateway_ledger import GatewayLedger
from common.mesh.gateway_probes import GAP_S, GatewayProbes
from common.mesh.gateway_request import GatewayRequest
from common.mesh.gateway_service import GatewayService
from common.mesh.gateway_streams import GatewayStreams, deadline_passed
from common.mesh.worker_registry import WorkerRegistry
from common.policy.counted_draws import CountedDraws
from common.policy.placement import Draws
from common.policy.routing import PlacementRules
from common.protocol.messages import (
    DispatchReply,
    ReplayEntry,
    ReplayItem,
    SequenceNotice,
    Snapshot,
    StageSeconds,
    TokenFrame,
)
from common.protocol.token_stream import TokenStream
from common.values.errors import (
    RequestError,
    SegueError,
    Unavailable,
)
from common.values.ids import GatewayId, Incarnation, ModelKey, RequestId, WorkerId
from common.values.request_class import WantedSpeed
from common.values.sampling import SamplingParameters
from common.values.slo import Slo
from common.values.tokens import NewTokens


class GatewayCore:
    """One per gateway process."""

    def __init__(
        self,
        *,
        gateway: GatewayId,
        incarnation: Incarnation,
        slo: Slo | None = None,
        strays_from: float = -math.inf,
        rules: PlacementRules | None = None,
        draws: Draws | None = None,
    ) -> None:
        """`slo` bounds silences, `rules` and `draws` are for placement.

        Before `strays_from` frames may come that a gateway of this id asked for which has died: its requests are adopted,
        or their workers end them."""
        self._ledger = GatewayLedger(gateway=gateway, incarnation=incarnation, slo=slo if slo is not None else Slo())
        self.arrivals = ArrivalLedger()
        self._cancels = GatewayCancels(self._ledger, strays_from=strays_from)
        self._attempts = GatewayAttempts(self._ledger, self._cancels, rules or PlacementRules(), draws or CountedDraws())
        self._streams = GatewayStreams(self._ledger, self._attempts)
        self._probes = GatewayProbes(self._ledger, self._attempts, self._streams)

    @property
    def registry(self) -> WorkerRegistry:
        return self._ledger.registry

    @property
    def counters(self) -> Counter[str]:
        return self._ledger.counters

    def take_effects(self) -> list[GatewayEffect]:
        effects = list(self._ledger.effects)
        self._ledger.effects.clear()
        return effects

    @property
    def service(self) -> GatewayService:
        return self._ledger.service

    @property
    def active(self) -> int:
        return len(self._ledger.requests)

    def longest_silence_s(self) -> float:
        """The present bound: a worker that is silent for longer is taken for lost."""
        return max((self._ledger.bounds(s.worker).lost_after_s for s in self.registry.all()), default=0.0)

    def active_ids(self) -> list[RequestId]:
        return list(self._ledger.requests)

    def get_timer(self, now: float) -> float | None:
        """When `on_tick` is due; None while nothing runs."""
        return now + GAP_S if self._ledger.requests else None

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
        wanted: WantedSpeed | None = None,
    ) -> None:
        """Place a request. Raises Unavailable where no worker of the model is ready, Overloaded where it would be late and is to be
        told so."""
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
            wanted=wanted or WantedSpeed(),
            started_at=now,
        )
        try:
            self._attempts.admit(request, now)
        finally:
            self.arrivals.note(request, self.service.tokens_left(request))

    def adopt(self, request: GatewayRequest, logged: Mapping[int, NewTokens], now: float) -> None:
        """Go on with another gateway's request. What its log holds is delivered first; then its workers are probed with our
        higher epoch, which turns their frames to us, and what was lost with a worker is placed again."""
        self._ledger.requests[request.request_id] = request
        self.counters["adopted"] += 1
        for choice, known in logged.items():
            for new in request.streams[choice].accept(request.attempt, known):
                self._ledger.emit(Deliver(request_id=request.request_id, choice=choice, new=new))
        if not request.unfinished():
            self._attempts.end(request, None, now)
        elif not request.answered:
            self._attempts.place(request, now)

    def drop(self, request_id: RequestId, now: float) -> None:
        """Another gateway owns this now: forget it, and leave its sequences alone."""
        request = self._ledger.requests.get(request_id)
        if request is not None:
            self._attempts.drop(request, now)

    def cancel(self, request_id: RequestId, choice: int | None, now: float) -> None:
        """The client left, or a stop string was matched: nothing more of it is wanted."""
        request = self._ledger.requests.get(request_id)
        if request is None:
            return
        if choice is not None and choice in request.streams:
            request.streams[choice].close()
        if choice is None or not request.unfinished():
            self._cancels.cancel_workers(request, None, now)
            self._attempts.end(request, None, now, cancelled=choice is None)
        else:
            self._cancels.cancel_workers(request, [choice], now)

    def abort(self, request_id: RequestId, attempt: int, error: SegueError, now: float) -> None:
        """The dispatch could not be sent: a new request is turned away, one that runs already waits for its probe, unless
        sending it again would fail again."""
        request = self._ledger.current(request_id, attempt)
        if request is None:
            return
        if request.accepted and not isinstance(error, RequestError):
            request.answered = True
        else:
            self._attempts.fail(request, error, now)

    # ------------------------------------------------------------------ the mesh's events

    def on_snapshot(self, message: Snapshot, now: float) -> None:
        if message.gone:
            self._notice_farewell(message.snapshot.worker, message.snapshot.incarnation, now)
        else:
            self._notice_restart(message.snapshot.worker, message.snapshot.incarnation)
        self.registry.observe(message.snapshot, now, gone=message.gone)
        if self.registry.observe_cache(message.snapshot, message.cache, now):
            self._ledger.emit(AskCache(worker=message.snapshot.worker))
        for request in list(self._ledger.requests.values()):
            if request.retry_at is not None and now >= request.retry_at:
                self._attempts.place(request, now)

    def on_dispatch_answer(
        self, request_id: RequestId, attempt: int, worker: WorkerId, reply: DispatchReply | None, now: float
    ) -> None:
        """`reply` is None where none came in time: the worker is probed."""
        request = self._ledger.current(request_id, attempt)
        if request is None or request.answered:
            return
        request.answered = True
        if reply is None:
            request.unanswered[worker] += 1
            request.heard_at = dict.fromkeys(request.heard_at, -math.inf)
            return
        match reply.verdict:
            case "accepted":
                self._attempts.accept(request, worker)
            case "full" | "stale":
                self.counters[f"dispatch_{reply.verdict}"] += 1
                self._attempts.raise_attempt(request, now, lost=None, full=worker)
            case "refused":
                self._attempts.refused(request, worker, reply, now)

    def on_frame(self, frame: TokenFrame, now: float) -> None:
        worker = WorkerId(frame.worker)
        self.registry.heard(worker, now)
        for notice in frame.notices:
            self._on_notice(worker, Incarnation(frame.incarnation), notice, now)
        for entry in frame.entries:
            request = self._ledger.requests.get(RequestId(entry.request_id))
            if request is None or entry.attempt < request.attempt:
                self._cancels.cancel_stray(worker, entry, None, now)
            elif entry.attempt == request.attempt and entry.choice in request.streams:
                request.involve(worker, Incarnation(frame.incarnation))
                if entry.stages is not None:
                    _note_stages(request, entry.stages)
                self._attempts.accept(request, worker)
                if request.streams[entry.choice].ended:
                    self._cancels.cancel_stray(worker, entry, [entry.choice], now)
                else:
                    self._streams.take(request, entry.choice, worker, entry.new, now)

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
        self._probes.on_answer(worker, items, entries, now, broker_alive=broker_alive, incarnation=incarnation)

    def on_tick(self, now: float) -> None:
        """Every 50 ms while requests run: gaps and silences are probed, deadlines kept."""
        self.registry.expire(now)
        for request in list(self._ledger.requests.values()):
            if request.deadline is not None and now > request.deadline:
                self._attempts.fail(request, deadline_passed(), now)
            elif request.retry_at is not None:
                if now >= request.retry_at:
                    self._attempts.place(request, now)
            elif request.answered:
                self._probes.look_at(request, now)
        self._probes.ask(now)

    # ------------------------------------------------------------------ private

    def _notice_restart(self, worker: WorkerId, incarnation: Incarnation) -> None:
        """A worker that speaks as a new incarnation has lost what the old one had: ask at once."""
        known = self.registry.get(worker)
        if known is not None and known.incarnation == incarnation:
            return
        for request in self._ledger.following(worker):
            had = request.incarnations.get(worker)
            if had is not None and had != incarnation:
                request.heard_at = dict.fromkeys(request.heard_at, -math.inf)

    def _notice_farewell(self, worker: WorkerId, incarnation: Incarnation, now: float) -> None:
        """What a worker had not finished when it left is placed again; nothing was lost by that."""
        for request in self._ledger.following(worker):
            if request.incarnations.get(worker) == incarnation:
                request.avoid.add(worker)
                self._attempts.raise_attempt(request, now, lost=None, full=None)
        for request in self._ledger.requests.values():
            if request.incarnations.get(worker) == incarnation:
                request.involved.discard(worker)

    def _on_notice(self, worker: WorkerId, incarnation: Incarnation, notice: SequenceNotice, now: float) -> None:
        request = self._ledger.current(RequestId(notice.request_id), notice.attempt)
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
                self._streams.follow(request, notice.choice, worker, WorkerId(notice.moved_to))
            case "handed_back":
                self.counters["handed_back"] += 1
                moved_to = None if notice.moved_to is None else WorkerId(notice.moved_to)
                self._attempts.handed_back(request, worker, moved_to, now)
            case _:
                pass


def _note_stages(request: GatewayRequest, stages: StageSeconds) -> None:
    """Of all workers that a choice was at; with several choices those of the last one to say so."""
    named = (
        ("prefill_queue", stages.prefill_queue_s),
        ("prefill", stages.prefill_s),
        ("transfer", stages.transfer_s),
        ("decode_queue", stages.decode_queue_s),
    )
    request.stages.update({name: seconds for name, seconds in named if seconds is not None})
