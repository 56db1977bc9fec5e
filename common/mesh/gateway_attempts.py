"""Attempts of a gateway's requests: each is one placement with a number, and a lost or full worker raises it.

Fencing is by attempt: whatever carries a lower one is dropped.
"""

import math

from common.mesh.gateway_cancels import GatewayCancels
from common.mesh.gateway_effects import Accepted, Dropped, Ended, SendDispatch
from common.mesh.gateway_ledger import GatewayLedger
from common.mesh.gateway_request import GatewayRequest
from common.policy.placement import Draws
from common.policy.routing import Placement, PlacementRules, Turn, place
from common.policy.worker_outlook import PendingLoad, WorkerOutlook
from common.protocol.messages import ChoiceState, Dispatch, DispatchReply, pack_ids
from common.values.errors import ContextTooLong, InvalidRequest, NeverFits, Overloaded, RequestFailed, SegueError, Unavailable
from common.values.ids import WorkerId

MAX_RAISES = 64
PATIENCE_S = 30.0
FULL_RETRY_S = 0.25
"""How long a running request waits before it asks again, where every worker's queue is full."""
_REFUSALS: dict[str, type[InvalidRequest | ContextTooLong | NeverFits | Unavailable]] = {
    "unavailable": Unavailable,
    "context_length_exceeded": ContextTooLong,
    "kv_cache_too_small": NeverFits,
}


class GatewayAttempts:
    """`draws` and turns are for baselines, which do not look at load."""

    def __init__(self, ledger: GatewayLedger, cancels: GatewayCancels, rules: PlacementRules, draws: Draws) -> None:
        self._ledger = ledger
        self._cancels = cancels
        self._rules = rules
        self._draws = draws
        self._turns = 0

    def admit(self, request: GatewayRequest, now: float) -> None:
        """A new request: place it. Raises Overloaded where it would be late, and its class says that it is told so."""
        placement, workers = self._find_place(request, now)
        if placement is not None:
            self._ledger.service.admit(request, placement, workers, now)
        self._ledger.requests[request.request_id] = request
        self._dispatch_to(request, placement, now)

    def place(self, request: GatewayRequest, now: float, *, at: WorkerId | None = None) -> None:
        """Begin an attempt of a request that is owned here: `at` that worker, where it is ready."""
        self._dispatch_to(request, self._find_place(request, now, at)[0], now)

    def _find_place(
        self, request: GatewayRequest, now: float, at: WorkerId | None = None
    ) -> tuple[Placement | None, list[WorkerOutlook]]:
        service, workers = self._ledger.service, self._ledger.outlooks(request)
        workers = [o for o in workers if o.worker == at and o.snapshot.state == "ready"] or workers
        outlook = service.outlook(request, workers, now)
        self._turns += 1
        placement = place(
            workers,
            outlook,
            Turn(number=self._turns, draws=self._draws),
            needs_decode=_needs_decode_worker(request),
            rules=self._rules,
            avoid=request.avoid | self._ledger.registry.silent(self._ledger.slo, now),
            prompts_asked=service.prompts_asked(request.model, workers, now),
        )
        return placement, workers

    def _dispatch_to(self, request: GatewayRequest, placement: Placement | None, now: float) -> None:
        if placement is None:
            self._wait(request, now, Unavailable(f"no worker that serves {request.model.name} is left"), retry_s=0.0)
            return
        self._begin_attempt(request, placement, now)
        self._count_load(request, placement)
        dispatch = self._dispatch(request, placement.decode, now)
        within_s = self._ledger.bounds(placement.worker).lost_after_s
        self._ledger.emit(SendDispatch(worker=placement.worker, dispatch=dispatch, within_s=within_s, kind=placement.kind))

    def _count_load(self, request: GatewayRequest, placement: Placement) -> None:
        """Until snapshots show it."""
        unfinished = request.unfinished()
        contexts = sum(len(request.prompt) + len(stream.tokens) for stream in unfinished)
        prompt = PendingLoad(tokens=len(request.prompt) - placement.prompt.cached)
        streams = PendingLoad(sequences=len(unfinished), context_tokens=contexts)
        self._ledger.counters[f"placed_{placement.kind}"] += 1
        if placement.decode is None:
            self._ledger.registry.dispatched(placement.worker, prompt + streams)
        else:
            self._ledger.registry.dispatched(placement.worker, prompt)
            self._ledger.promised.promise(request.request_id, placement.decode, streams)

    def accept(self, request: GatewayRequest, worker: WorkerId) -> None:
        """A worker has the request, by its answer or by what it sends."""
        request.answered = True
        request.unanswered.pop(worker, None)
        request.waits_since = None
        if not request.accepted:
            request.accepted = True
            self._ledger.emit(Accepted(request_id=request.request_id))

    def refused(self, request: GatewayRequest, worker: WorkerId, reply: DispatchReply, now: float) -> None:
        """A new request is not for this mesh. One that ran elsewhere before may still fit another worker. A worker that serves
        another model than we knew is forgotten until it is heard again."""
        if reply.code == "wrong_model":
            self._ledger.counters["wrong_model"] += 1
            self._ledger.registry.forget(worker)
            self.raise_attempt(request, now, lost=None, full=None)
            return
        if request.accepted and worker not in request.avoid:
            self.raise_attempt(request, now, lost=None, full=worker)
            return
        self.fail(request, _REFUSALS.get(reply.code, InvalidRequest)(reply.message), now)

    def handed_back(self, request: GatewayRequest, worker: WorkerId, siblings_at: WorkerId | None, now: float) -> None:
        """A worker has dropped the request, because it drains, or because others of its choices decode elsewhere: there, or in
        the place of those, all go on. Who is forgotten meanwhile and took no leave has been lost with them."""
        if siblings_at is None or len(request.unfinished()) < 2:
            request.avoid.add(worker)
            self.raise_attempt(request, now, lost=None, full=None)
            return
        followed = (request.source[s.choice] for s in request.unfinished() if request.source[s.choice] != worker)
        at = next(followed, siblings_at)
        known = self._ledger.registry.get(at)
        lost = known is None or known.incarnation != request.incarnations.get(at, known.incarnation)
        if lost and at in request.involved:
            self.raise_attempt(request, now, lost=at, full=None)
        else:
            self.raise_attempt(request, now, lost=None, full=None, at=at)

    def raise_attempt(
        self,
        request: GatewayRequest,
        now: float,
        *,
        lost: WorkerId | None,
        full: WorkerId | None,
        at: WorkerId | None = None,
    ) -> None:
        """A lost worker is forgotten until it is heard again, and its sequences are suspects. A worker without room is no
        fault of anybody: a new request is turned away once all have refused, a running one asks again later."""
        if request.retry_at is not None:
            return
        self._cancels.cancel_workers(request, None, now)
        if full is not None:
            self._refused_by(request, full, now)
            return
        request.raises += 1
        request.together = True
        poison = False
        if lost is not None:
            self._ledger.counters["workers_lost"] += 1
            poison = request.suspicion.worker_lost(lost, [stream.choice for stream in request.unfinished()])
            request.avoid.add(lost)
            self._ledger.registry.forget(lost)
        if poison:
            self._ledger.counters["requests_poisoned"] += 1
            message = "two workers in a row were lost while they ran this request: it is not tried on a third"
            self.fail(request, RequestFailed(message, code="request_poisoned", status=502), now)
        elif request.raises >= MAX_RAISES:
            self.fail(request, Unavailable("the mesh could not place this request"), now)
        else:
            self.place(request, now, at=at)

    def fail(self, request: GatewayRequest, error: SegueError, now: float) -> None:
        self._cancels.cancel_workers(request, None, now)
        self.end(request, error, now)

    def end(self, request: GatewayRequest, error: SegueError | None, now: float, *, cancelled: bool = False) -> None:
        del self._ledger.requests[request.request_id]
        self._cancels.over(request)
        self._ledger.promised.settle(request.request_id)
        account = self._ledger.service.end(request, now, outcome="failed" if error is not None else "cancelled" if cancelled else None)
        self._ledger.emit(Ended(request_id=request.request_id, error=error, account=account))

    def drop(self, request: GatewayRequest, now: float) -> None:
        """Another gateway owns this now: forget it, and leave its sequences alone."""
        del self._ledger.requests[request.request_id]
        self._ledger.promised.settle(request.request_id)
        self._ledger.counters["dropped"] += 1
        self._cancels.left_alone(request, now)
        self._ledger.emit(Dropped(request_id=request.request_id))

    def _begin_attempt(self, request: GatewayRequest, placement: Placement, now: float) -> None:
        request.retry_at = None
        request.attempt += 1
        request.worker = placement.worker
        request.placement = placement.kind
        self._ledger.promised.settle(request.request_id)
        request.answered = False
        request.unanswered.clear()
        request.asked.clear()
        request.involved = set()
        request.incarnations.clear()
        request.suspicion.placed_again()
        for worker in (placement.worker, placement.decode):
            snapshot = None if worker is None else self._ledger.registry.get(worker)
            if worker is not None:
                request.involve(worker, None if snapshot is None else snapshot.incarnation)
        for stream in request.unfinished():
            stream.raise_attempt(request.attempt)
            request.source[stream.choice] = placement.worker
            request.heard_at[stream.choice] = now

    def _dispatch(self, request: GatewayRequest, decode: WorkerId | None, now: float) -> Dispatch:
        service = self._ledger.service
        return Dispatch(
            request_id=request.request_id,
            attempt=request.attempt,
            gateway=self._ledger.gateway,
            incarnation=self._ledger.incarnation,
            epoch=request.epoch,
            model=request.model,
            prompt=pack_ids(request.prompt),
            choices=[ChoiceState(choice=s.choice, tokens=list(s.tokens)) for s in request.unfinished()],
            sampling=request.sampling,
            decode_worker=decode,
            salt=request.salt,
            remaining_s=None if request.deadline is None else max(0.0, request.deadline - now),
            suspect=bool(request.suspicion.choices),
            ttft_left_s=None if request.objectives is None else service.ttft_left_s(request, now),
            tpot_s=None if request.objectives is None else request.objectives.tpot_s,
            best_effort=request.best_effort,
            gives_way=request.gives_way,
            expected_tokens=math.ceil(service.tokens_left(request)),
            accepted_before=request.accepted,
        )

    def _wait(self, request: GatewayRequest, now: float, error: SegueError, *, retry_s: float) -> None:
        """Nobody takes the request now: try again later, within one patience for the whole of the waiting."""
        request.waits_since = now if request.waits_since is None else request.waits_since
        request.retry_at = now + retry_s
        if now - request.waits_since > PATIENCE_S:
            self.fail(request, error, now)

    def _refused_by(self, request: GatewayRequest, full: WorkerId, now: float) -> None:
        if full not in request.avoid:
            request.avoid.add(full)
            self.place(request, now)
            return
        error = Overloaded("every worker's queue is full", retry_after_s=1.0)
        if request.accepted:
            request.avoid.clear()
            self._wait(request, now, error, retry_s=FULL_RETRY_S)
        else:
            self.fail(request, error, now)


def _needs_decode_worker(request: GatewayRequest) -> bool:
    """Choices of a request in trouble stay together: whatever they do, they take down one worker an attempt."""
    unfinished = request.unfinished()
    if request.together and len(unfinished) > 1:
        return False
    return any(len(s.tokens) + 1 < request.sampling.max_tokens for s in unfinished)
