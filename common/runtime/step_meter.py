"""Moving averages of what steps cost here, for the snapshots that the router reads."""

from common.values.step import StepPlan, StepResult

WEIGHT = 0.2


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
    return value if average == 0.0 else (1.0 - WEIGHT) * average + WEIGHT * value
