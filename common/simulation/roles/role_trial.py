"""What a change of roles would do: the mesh as it is now, run ahead in virtual time with and without it, under the same requests.

The simulator starts with what the snapshots tell: prompts that wait, streams that run. Requests are drawn from those that came
lately, at the forecast rate, from a seed that the decision's number gives: the same view gives the same trial.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from common.policy.load_forecast import LoadForecast
from common.policy.prefill_queue import BatchLimits
from common.policy.role_control import Trial
from common.policy.role_demand import RequestMean
from common.policy.role_view import MeshView, RoleMove, SeenRequest, WorkerView
from common.simulation.goodput.deployment import Deployment, Policies, TransferTime
from common.simulation.goodput.flight import Arrival, Flight
from common.simulation.goodput.goodput_simulator import GoodputSimulator
from common.values.objectives import Objectives

FIRST_NUMBER = 1 << 20
"""Requests that are there from the start have numbers behind those that come."""
MOST_WAITING = 200
TAIL_SHARE = 0.5
"""Requests come for that much longer than they are judged, so that the last of them decode in company."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSettings:
    """`step_tokens`: positions of a step that mixes; `batch_tokens`: of a prefill batch. `runs` with other draws each."""

    horizon_s: float
    runs: int
    most_requests: int
    step_tokens: int
    batch_tokens: int


class RoleTrial:
    """One decision's trials."""

    def __init__(self, view: MeshView, forecast: LoadForecast, mean: RequestMean, settings: TrialSettings, *, seed: int) -> None:
        self._view = view
        self._forecast = forecast
        self._mean = mean
        self._settings = settings
        self._seed = seed
        self._known = max(1.0, forecast.known_requests)
        self._workers = [*view.prefill, *view.decode, *view.both]
        self._kv_tokens = min(worker.kv_tokens for worker in view.workers)
        self._deployment = Deployment(
            prefill=len(view.prefill),
            decode=len(view.decode),
            both=len(view.both),
            step_time=view.step_time,
            kv_tokens=self._kv_tokens,
            max_sequences=min(worker.max_sequences for worker in view.workers),
            batch=BatchLimits(max_tokens=settings.batch_tokens),
            step_tokens=settings.step_tokens,
            transfer=TransferTime(base_s=view.transfer_base_s, per_token_s=view.transfer_per_token_s),
            policies=Policies(free=view.free),
            changeable=True,
        )

    def attempt(self, move: RoleMove) -> Trial:
        """Two runs that gain nothing settle it."""
        stay: list[float] = []
        moved: list[float] = []
        for run in range(self._settings.runs):
            stay.append(self._good_share(run, None))
            moved.append(self._good_share(run, move))
            if run == 1 and sum(moved) <= sum(stay):
                break
        return Trial(move=move, stay=tuple(stay), moved=tuple(moved))

    def _good_share(self, run: int, move: RoleMove | None) -> float:
        rng = Random(self._seed * self._settings.runs + run)
        requests, weights = self._resampled(rng)
        waiting = [
            (number, each) for number, worker in enumerate(self._workers) for each in self._waiting(worker, requests, weights, rng)
        ]
        arrivals, judged = self._arrivals(requests, weights, rng.gammavariate(self._known, 1.0 / self._known), rng)
        objectives = {_class_of(request): Objectives(ttft_s=request.ttft_s, tpot_s=request.tpot_s) for request in requests}
        objectives[""] = Objectives(ttft_s=1.0, tpot_s=self._mean.tpot_s)
        simulator = GoodputSimulator(self._deployment, objectives, rng)
        for request in requests:
            simulator.learn(_class_of(request), request.output_tokens)
        there: list[Flight] = []
        for number, arrival in [*waiting, *self._streams(requests, weights, rng)]:
            flight = simulator.flight_of(FIRST_NUMBER + len(there), arrival)
            flight.first_token_s = None if arrival.request_class else 0.0
            there.append(flight)
            simulator.begin_with(number, flight)
        if move is not None:
            simulator.change_role([worker.worker for worker in self._workers].index(move.worker), move.role, 0.0)
        # good ones of all, by those that come: what is there already is lost or not, and would only dilute the gain
        good = sum(map(_is_good, [*simulator.run(arrivals)[:judged], *there]))
        return good / judged if judged else 0.0

    def _resampled(self, rng: Random) -> tuple[Sequence[SeenRequest], Sequence[float]]:
        """Another sample that might as well have been seen (a bootstrap): a mix that few requests tell of differs from run to run."""
        requests, weights = self._forecast.mix()
        places = rng.choices(range(len(requests)), k=len(requests))
        return [requests[place] for place in places], [weights[place] for place in places]

    def _arrivals(
        self, requests: Sequence[SeenRequest], weights: Sequence[float], factor: float, rng: Random
    ) -> tuple[list[Arrival], int]:
        """At the forecast rate times `factor`; and how many of them are judged."""
        arrivals: list[Arrival] = []
        judged, now = 0, 0.0
        while len(arrivals) < self._settings.most_requests and (rate := factor * self._forecast.rate_at(now)) > 0.0:
            now += rng.expovariate(rate)
            if now > self._settings.horizon_s * (1.0 + TAIL_SHARE):
                break
            (request,) = rng.choices(requests, weights)
            arrivals.append(self._arrival(request, now))
            judged += now <= self._settings.horizon_s
        return arrivals, min(judged, round(self._settings.most_requests / (1.0 + TAIL_SHARE)))

    def _arrival(self, request: SeenRequest, at: float) -> Arrival:
        prompt = min(request.prompt_tokens, self._kv_tokens - 1)
        output = min(request.output_tokens, self._kv_tokens - prompt)
        return Arrival(arrived_s=at, prompt_tokens=prompt, output_tokens=output, request_class=_class_of(request))

    def _waiting(self, worker: WorkerView, requests: Sequence[SeenRequest], weights: Sequence[float], rng: Random) -> list[Arrival]:
        """Prompts of as many seconds as wait there: they came one after the other while that work gathered."""
        count = min(MOST_WAITING, round(worker.prefill_queue_s / self._mean.prefill_s)) if self._mean.prefill_s > 0.0 else 0
        drawn = rng.choices(requests, weights, k=count)
        return [self._arrival(each, -worker.prefill_queue_s * (count - place) / count) for place, each in enumerate(drawn)]

    def _streams(self, requests: Sequence[SeenRequest], weights: Sequence[float], rng: Random) -> list[tuple[int, Arrival]]:
        """Streams as those requests would leave them: a long answer is met more often, anywhere on its way. Their contexts and what is
        left of them are then scaled to what the worker tells."""
        met = [weight * request.output_tokens for request, weight in zip(requests, weights, strict=True)]
        streams = []
        for number, worker in enumerate(self._workers):
            drawn = [(each, rng.random()) for each in rng.choices(requests, met, k=min(worker.decoding, worker.max_sequences))]
            contexts = [each.prompt_tokens + passed * each.output_tokens for each, passed in drawn]
            lefts = [(1.0 - passed) * each.output_tokens for each, passed in drawn]
            wider = worker.decoding_kv_tokens / sum(contexts) if drawn else 1.0
            longer = worker.tokens_left * len(drawn) / sum(lefts) if drawn else 1.0
            for context, left in zip(contexts, lefts, strict=True):
                cached = min(self._kv_tokens - 2, max(1, round(wider * context)))
                output = min(max(1, round(longer * left)) + 1, self._kv_tokens - cached)
                streams.append((number, Arrival(arrived_s=0.0, prompt_tokens=cached, output_tokens=output)))
        return streams


def _class_of(request: SeenRequest) -> str:
    """Requests of the same objectives are one class."""
    return f"{request.ttft_s:g}/{request.tpot_s:g}"


def _is_good(flight: Flight) -> bool:
    speed = flight.speed()
    return speed is not None and speed.meets(flight.objectives, flight.unloaded_s)
