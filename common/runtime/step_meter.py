"""Moving averages of what steps cost here, for the snapshots that the router reads."""

from common.values.step import StepPlan, StepResult

WEIGHT = 0.2
MOST_TIMES = 5.0
"""A step counts for this many usual ones at most: one in which the process was frozen says nothing about steps, and bounds on
silence, which grow with the usual step, must not grow with it. What really became slower is followed within some steps."""


class StepMeter:
    """`seconds_per_prefill_token` from steps that hold prompt chunks, `seconds_per_step` from steps of decode rows alone."""

    def __init__(self) -> None:
        self.seconds_per_prefill_token = 0.0
        self.seconds_per_step = 0.0

    def observe(self, plan: StepPlan, result: StepResult) -> None:
        chunk_tokens = sum(row.count for row in plan.rows if row.count > 1)
        if not chunk_tokens:
            self.seconds_per_step = _blend(self.seconds_per_step, result.duration_s)
        elif chunk_tokens >= plan.tokens // 2:
            self.seconds_per_prefill_token = _blend(self.seconds_per_prefill_token, result.duration_s / plan.tokens)


def _blend(average: float, value: float) -> float:
    return value if average == 0.0 else (1.0 - WEIGHT) * average + WEIGHT * min(value, MOST_TIMES * average)
