"""The controller of roles: what it remembers from view to view, the rules of `policy/role_control`, and the simulator in its loop.

A decision depends on its settings and on the views so far, on nothing else: the same views give the same decisions, bit for bit.
"""

from dataclasses import dataclass, field

from common.policy.load_forecast import LoadForecast
from common.policy.role_control import RoleControlSettings, RoleDecision, RoleGuard, Trial, decide
from common.policy.role_demand import mean_of
from common.policy.role_view import MeshView, RoleMove
from common.simulation.roles.role_trial import RoleTrial, TrialSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerSettings:
    """`step_tokens` and `batch_tokens`: of the workers' steps that mix and prefill."""

    control: RoleControlSettings = field(default_factory=RoleControlSettings)
    step_tokens: int = 256
    batch_tokens: int = 2048


class RoleController:
    def __init__(self, settings: ControllerSettings) -> None:
        self._settings = settings
        self._forecast = LoadForecast(settings.control.forecast)
        self._guard = RoleGuard(settings.control)
        self._decided = 0

    def decide(self, view: MeshView) -> RoleDecision:
        control = self._settings.control
        self._decided += 1
        self._forecast.observe(view.seconds, view.arrived, view.seen)
        mean = mean_of(*self._forecast.mix(), view)
        rate = self._forecast.rate_at(0.5 * control.horizon_s)

        def attempt(move: RoleMove) -> Trial:
            assert mean is not None, "decide tries nothing where nothing was seen"
            trial = TrialSettings(
                horizon_s=control.horizon_s,
                runs=control.trials,
                most_requests=control.most_requests,
                step_tokens=self._settings.step_tokens,
                batch_tokens=self._settings.batch_tokens,
            )
            return RoleTrial(view, self._forecast, mean, trial, seed=self._decided).attempt(move)

        return decide(self._decided, view, self._guard, control, mean=mean, rate=rate, attempt=attempt)
