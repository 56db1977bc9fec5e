"""Notices a model step that hangs: its thread is stuck while the event loop, whose heartbeat the supervisor hears, goes on.

The bound follows from what steps cost here. A worker beyond it says that it is dead (no heartbeat, `/health` 503), and who
watches it replaces it like a frozen one.
"""

from common.runtime.step_meter import StepMeter
from common.values.step import StepPlan

LEAST_BOUND_S = 10.0
UNMEASURED_BOUND_S = 60.0
"""For the first step of a kind: its cost is not known, and it may compile or touch much for the first time."""
TIMES_PREDICTED = 20.0


class StepWatch:
    """`began` with the step that computes now, `ended` when none does. Reads no clock."""

    def __init__(self, meter: StepMeter) -> None:
        self._meter = meter
        self._due: float | None = None

    def began(self, plan: StepPlan, now: float) -> None:
        self._due = now + self.bound_s(plan)

    def ended(self) -> None:
        self._due = None

    def hangs(self, now: float) -> bool:
        return self._due is not None and now > self._due

    def bound_s(self, plan: StepPlan) -> float:
        per_step, per_token = self._meter.seconds_per_step, self._meter.seconds_per_prefill_token
        chunk_tokens = sum(row.count for row in plan.rows if row.count > 1)
        if per_step == 0.0 or (chunk_tokens and per_token == 0.0):
            return UNMEASURED_BOUND_S
        return max(LEAST_BOUND_S, TIMES_PREDICTED * (per_step + chunk_tokens * per_token))
