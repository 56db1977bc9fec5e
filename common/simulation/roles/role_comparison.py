"""The controller against every static split and against a threshold rule, under the same requests."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from common.policy.role_threshold import ThresholdControl, ThresholdRule
from common.policy.role_view import MeshView, RoleMove
from common.simulation.goodput.deployment import Deployment
from common.simulation.roles.role_controller import ControllerSettings, RoleController
from common.simulation.roles.scenario_run import ScenarioOutcome, run_scenario
from common.simulation.roles.scenarios import LoadEnds, Scenario


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """`static`: the share of good requests by split, (prefill, decode)."""

    scenario: str
    requests: int
    static: dict[tuple[int, int], float]
    threshold: ScenarioOutcome
    controller: ScenarioOutcome

    @property
    def best_static(self) -> tuple[tuple[int, int], float]:
        """In hindsight: nobody knows it beforehand."""
        return max(self.static.items(), key=lambda entry: entry[1])

    @property
    def lead(self) -> float:
        """Of the controller over the better of the best static split and the threshold rule."""
        return self.controller.report.total.attained - max(self.best_static[1], self.threshold.report.total.attained)


def compare(
    scenario: Scenario,
    ends: LoadEnds,
    deployment: Deployment,
    rule: ThresholdRule,
    *,
    seed: int,
    settings: ControllerSettings | None = None,
) -> Comparison:
    """`deployment` is what the controller and the rule begin with."""
    arrivals = scenario.draw(ends, Random(seed))
    objectives = {kind.name: kind.objectives for kind in (ends.reading, ends.writing)}
    means = {kind.name: kind.output.mean for kind in (ends.reading, ends.writing)}

    def outcome(of: Deployment, director: Callable[[MeshView], RoleMove | None] | None) -> ScenarioOutcome:
        return run_scenario(of, objectives, arrivals, director, output_means=means)

    workers = deployment.prefill + deployment.decode
    splits = [(prefill, workers - prefill) for prefill in range(1, workers)]
    static = {
        (prefill, decode): outcome(replace(deployment, prefill=prefill, decode=decode), None).report.total.attained
        for prefill, decode in splits
    }
    controller = RoleController(settings or ControllerSettings())
    return Comparison(
        scenario=scenario.name,
        requests=len(arrivals),
        static=static,
        threshold=outcome(deployment, ThresholdControl(rule).decide),
        controller=outcome(deployment, lambda view: controller.decide(view).move),
    )
