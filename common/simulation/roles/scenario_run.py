"""One scenario on one deployment whose roles somebody may change: what was good, and every change with its time."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from common.policy.role_view import MeshView, RoleMove, SeenRequest, WorkerView
from common.simulation.goodput.deployment import Deployment
from common.simulation.goodput.flight import Arrival
from common.simulation.goodput.goodput_report import GoodputReport, report_of
from common.simulation.goodput.goodput_simulator import GoodputSimulator, Look
from common.simulation.goodput.mixing_worker import MixingWorker
from common.values.objectives import Objectives

Director = Callable[[MeshView], RoleMove | None]
"""Asked at every look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioOutcome:
    report: GoodputReport
    changes: tuple[tuple[float, RoleMove], ...]

    @property
    def closest_s(self) -> float | None:
        """The least time between two changes."""
        times = [at for at, _ in self.changes]
        return min((later - sooner for sooner, later in pairwise(times)), default=None)


def run_scenario(
    deployment: Deployment,
    objectives: Mapping[str, Objectives],
    arrivals: Sequence[Arrival],
    director: Director | None,
    *,
    look_every_s: float = 1.0,
    output_means: Mapping[str, float] | None = None,
) -> ScenarioOutcome:
    """`director` None: the roles stay as the deployment begins. Its workers must be changeable. `output_means` by class are known from
    before, as they are where a mesh has served for a while."""
    simulator = GoodputSimulator(deployment, objectives, Random(0))
    for request_class, mean in (output_means or {}).items():
        simulator.learn(request_class, round(mean))
    times = [arrival.arrived_s for arrival in arrivals]
    changes: list[tuple[float, RoleMove]] = []
    before = 0.0

    def look(now: float) -> None:
        nonlocal before
        since = arrivals[bisect_right(times, before) : bisect_right(times, now)]
        view = _view(simulator, deployment, objectives, since, now, now - before)
        before = now
        move = director(view) if director is not None else None
        if move is not None:
            changes.append((now, move))
            simulator.change_role(int(move.worker), move.role, now)

    flights = simulator.run(arrivals, Look(look, look_every_s) if director is not None else None)
    return ScenarioOutcome(report=report_of(flights), changes=tuple(changes))


def _view(
    simulator: GoodputSimulator,
    deployment: Deployment,
    objectives: Mapping[str, Objectives],
    since: Sequence[Arrival],
    now: float,
    seconds: float,
) -> MeshView:
    prefill = deployment.step_time.prefill

    def seen(arrival: Arrival) -> SeenRequest:
        wanted = objectives.get(arrival.request_class) or objectives[""]
        return SeenRequest(
            prompt_tokens=arrival.prompt_tokens,
            output_tokens=max(1, round(simulator.expected_tokens(arrival))),
            ttft_s=wanted.ttft_for(prefill.seconds(arrival.prompt_tokens)),
            tpot_s=wanted.tpot_s,
        )

    return MeshView(
        now=now,
        seconds=seconds,
        arrived=len(since),
        seen=tuple(map(seen, since)),
        workers=tuple(_worker(simulator, deployment, number, now) for number in range(deployment.workers)),
        step_time=deployment.step_time,
        transfer_base_s=deployment.transfer.base_s,
        transfer_per_token_s=deployment.transfer.per_token_s,
        free=deployment.policies.free,
    )


def _worker(simulator: GoodputSimulator, deployment: Deployment, number: int, now: float) -> WorkerView:
    worker = simulator.workers[number]
    if not isinstance(worker, MixingWorker):
        raise ValueError("only changeable workers can be looked at")
    left = [simulator.expected_tokens(flight.arrival, made) - made for flight, made in worker.streams_at(now)]
    return WorkerView(
        worker=str(number),
        role="both" if number >= deployment.prefill + deployment.decode else "prefill" if simulator.is_prefill(number) else "decode",
        prefill_queue_s=worker.prompt_queue_s(now),
        decoding=worker.streams,
        decoding_kv_tokens=worker.kv_tokens_at(now),
        tokens_left=sum(left) / len(left) if left else 0.0,
        kv_tokens=deployment.kv_tokens,
        max_sequences=deployment.max_sequences,
    )
