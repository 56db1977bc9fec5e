"""What a gateway promises its requests: objectives, admission, shares of keys; and what it learns from how they ended.

Only a request's first placement is admitted or refused. One that runs is placed again whatever the load: a death is no fault
of its client.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from common.mesh.gateway_request import GatewayRequest
from common.policy.admission import Refused, ServedLate, decide_admission
from common.policy.fair_share import FADES_S, Fading, FairShare
from common.policy.objective_choice import objectives_of
from common.policy.output_length import OutputLengths
from common.policy.routing import Placement
from common.policy.site_questions import PlacedRequest, decode_outlook, prefill_outlook
from common.policy.worker_outlook import WorkerOutlook
from common.values.errors import Overloaded
from common.values.ids import ModelKey
from common.values.objectives import Speed
from common.values.request_account import RequestAccount

ALLOWANCE = 8192.0
"""Weighted tokens that a key may have had lately in any case: a long prompt and its answer."""
MAX_CLASSES = 256


@dataclass(slots=True)
class _Demand:
    """Of one model lately: seconds of prompts, and sequences that began."""

    prompts_s: Fading
    sequences: Fading


class GatewayService:
    """One per gateway; of what other gateways take it sees only what workers' snapshots tell."""

    def __init__(self) -> None:
        self.ended: Counter[tuple[str, str]] = Counter()
        self._lengths = OutputLengths()
        self._shares: dict[str, FairShare] = {}
        self._demands: dict[ModelKey, _Demand] = {}

    def outlook(self, request: GatewayRequest, workers: list[WorkerOutlook], now: float) -> PlacedRequest:
        """The request as placement sees it now; its objectives are fixed the first time that a worker is there."""
        prompt_tokens = len(request.prompt) + max((len(s.tokens) for s in request.unfinished()), default=0)
        if request.objectives is None and workers:
            time = min(workers, key=lambda w: (w.snapshot.role == "decode", w.worker)).time
            request.objectives = objectives_of(request.wanted, time, len(request.prompt))
            request.unloaded_s = time.prefill.seconds(len(request.prompt))
        objectives = request.objectives
        return PlacedRequest(
            prompt_tokens=prompt_tokens,
            output_tokens=max(1.0, self.tokens_left(request)),
            ttft_s=math.inf if objectives is None else self.ttft_left_s(request, now),
            tpot_s=math.inf if objectives is None else objectives.tpot_s,
        )

    def ttft_left_s(self, request: GatewayRequest, now: float) -> float:
        """Until its first token is late. One that a worker has had is placed again as if it had just come: that it is late by the
        mesh's own fault must not put it behind all others."""
        if request.objectives is None:
            return 0.0
        since = now if request.accepted else request.started_at
        return max(0.0, since + request.objectives.ttft_for(request.unloaded_s) - now)

    def tokens_left(self, request: GatewayRequest) -> float:
        """Predicted, of the longest choice."""
        made = max((len(stream.tokens) for stream in request.unfinished()), default=0)
        return self._lengths.predicted(_length_class(request), request.sampling.max_tokens, made) - made

    def prompts_asked(self, model: ModelKey, workers: list[WorkerOutlook], now: float) -> float:
        """The share of the prefill workers' time that prompts have wanted lately."""
        demand = self._demands.get(model)
        sites = sum(w.snapshot.role != "decode" for w in workers)
        return 0.0 if demand is None else demand.prompts_s.at_time(now) / (FADES_S * max(1, sites))

    def admit(self, request: GatewayRequest, placement: Placement, workers: list[WorkerOutlook], now: float) -> None:
        """Raises Overloaded for a request that would be late, where its class says so."""
        if request.objectives is None:
            return
        demand = self._demand(request.model, now)
        streams = sum(w.snapshot.role != "prefill" for w in workers)
        decision = decide_admission(
            placement.stream.time.decode,
            prefill_outlook(placement.prompt_s, request.unloaded_s, utilisation=self.prompts_asked(request.model, workers, now)),
            decode_outlook(
                placement.stream.load,
                left_s=placement.stream.left_s,
                arrivals_per_s=demand.sequences.at_time(now) / FADES_S,
                workers=streams,
            ),
            request.objectives,
            context_tokens=len(request.prompt),
            late=request.wanted.late,
        )
        request.predicted = decision.predicted
        if isinstance(decision, Refused):
            self.ended[request.wanted.request_class, "refused"] += 1
            message = "the mesh is too busy to answer in time: it would be late for its objectives"
            raise Overloaded(message, retry_after_s=decision.retry_after_s)
        request.best_effort = isinstance(decision, ServedLate)
        request.gives_way = self._begin_share(request, now)
        demand.prompts_s.add(request.unloaded_s, now)
        demand.sequences.add(len(request.streams), now)

    def end(self, request: GatewayRequest, now: float, *, outcome: Literal["failed", "cancelled"] | None) -> RequestAccount:
        """Its account, and the last that is learnt from it. `outcome` is None where every choice has ended."""
        made = [len(stream.tokens) for stream in request.streams.values()]
        if outcome is None:
            for tokens in made:
                self._lengths.observe(_length_class(request), tokens)
        if request.wanted.account and request.wanted.request_class in self._shares:
            self._shares[request.wanted.request_class].end(request.wanted.account, sum(made), now)
        account = _account(request, had=None if outcome is not None else _had(request, max(made, default=0)))
        self.ended[account.request_class, outcome or _outcome(account)] += 1
        return account

    def _begin_share(self, request: GatewayRequest, now: float) -> bool:
        name, account = request.wanted.request_class, request.wanted.account
        if not account:
            return False
        if name not in self._shares:
            if len(self._shares) >= MAX_CLASSES:
                return False
            self._shares[name] = FairShare(ALLOWANCE)
        return self._shares[name].begin(account, len(request.prompt), now)

    def _demand(self, model: ModelKey, now: float) -> _Demand:
        if model not in self._demands:
            if len(self._demands) >= MAX_CLASSES:
                self._demands.pop(next(iter(self._demands)))
            self._demands[model] = _Demand(Fading(0.0, now), Fading(0.0, now))
        return self._demands[model]


def _length_class(request: GatewayRequest) -> str:
    return f"{request.model.name}/{request.wanted.request_class}"


def _had(request: GatewayRequest, longest: int) -> Speed | None:
    if request.first_token_at is None or request.last_token_at is None or request.is_adopted:
        return None
    between_s = request.last_token_at - request.first_token_at
    return Speed(ttft_s=request.first_token_at - request.started_at, tpot_s=between_s / (longest - 1) if longest > 1 else 0.0)


def _account(request: GatewayRequest, had: Speed | None) -> RequestAccount:
    objectives = request.objectives
    return RequestAccount(
        request_class=request.wanted.request_class,
        placement=request.placement,
        ttft_s=0.0 if objectives is None else objectives.ttft_for(request.unloaded_s),
        tpot_s=0.0 if objectives is None else objectives.tpot_s,
        best_effort=request.best_effort,
        gives_way=request.gives_way,
        predicted=request.predicted,
        had=had,
        stages=dict(request.stages),
    )


def _outcome(account: RequestAccount) -> str:
    if account.had is None:
        return "unjudged"
    if account.in_time and account.keeps_pace:
        return "good"
    return "late" if account.keeps_pace else "slow" if account.in_time else "late_and_slow"
