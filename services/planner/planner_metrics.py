"""What the planner shows of itself."""

from collections.abc import Callable
from typing import get_args

from common.policy.role_control import HoldReason
from common.policy.role_demand import Pressure
from common.runtime.message_refusals import REASONS
from common.runtime.metrics import Metrics
from services.planner.planner_service import PlannerService


def show_planner_metrics(metrics: Metrics, service: PlannerService) -> None:
    acting = metrics.gauge("segue_planner_acting", "1 where this planner changes roles, 0 where it only advises or watches.")
    acting.series().follow(lambda: float(service.acting))
    decisions = metrics.counter("segue_planner_decisions_total", "Decisions, by reason.", ("reason",))
    for reason in (*get_args(HoldReason), "gain", "phase without a worker"):
        decisions.series(reason).follow(lambda reason=reason: service.counts[reason])  # type: ignore[misc]
    changes = metrics.counter("segue_planner_changes_total", "Role changes sent to workers, by the new role.", ("role",))
    for role in ("prefill", "decode"):
        changes.series(role).follow(lambda role=role: service.changes[role])  # type: ignore[misc]
    lost = metrics.counter("segue_planner_changes_lost_total", "Role changes that no snapshot has shown in time.")
    lost.series().follow(lambda: service.watch.lost_changes)
    took = metrics.gauge("segue_planner_decide_seconds", "How long the last decision took.")
    took.series().follow(lambda: service.decide_s)
    pressed = metrics.gauge(
        "segue_planner_pressure", "What is asked of a phase by what it can do, of the most pressed model.", ("phase",)
    )
    pressed.series("prefill").follow(lambda: _worst(service, lambda pressure: pressure.prefill))
    pressed.series("decode").follow(lambda: _worst(service, lambda pressure: pressure.decode))
    rate = metrics.gauge("segue_planner_forecast_requests_per_second", "Forecast over all models.")
    rate.series().follow(lambda: sum(decision.rate for decision in service.last.values()))
    refused = metrics.counter("segue_messages_refused_total", "Messages of the mesh that could not be taken, by reason.", ("reason",))
    for why in REASONS:
        refused.series(why).follow(lambda why=why: service.refusals.counts[why])  # type: ignore[misc]


def _worst(service: PlannerService, of: Callable[[Pressure], float]) -> float:
    return max((of(decision.pressure) for decision in service.last.values() if decision.pressure is not None), default=0.0)
