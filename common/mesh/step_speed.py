"""What steps take here: the step-time model of this worker, refitted with the steps that it runs.

A step of prompt chunks alone teaches the prefill line, a step of decode rows alone the decode line; a mixed step teaches
neither, since nobody can tell which part took how long. Not every step is looked at: a model that changes over seconds is not
worth a fit every millisecond.
"""

from collections.abc import Sequence

from common.policy.step_time import Chunk, StepTime
from common.policy.step_time_fit import BatchSample, DecodeSample
from common.policy.step_time_refit import StepTimeRefit
from common.values.step import StepPlan, StepResult, StepRow

LOOKED_AT_EVERY_S = 0.05


class StepSpeed:
    """`start` is what a calibration or the warm-up has measured."""

    def __init__(self, start: StepTime) -> None:
        self._refit = StepTimeRefit(start)
        self._looked_at = float("-inf")
        self.current = start

    @property
    def refused(self) -> int:
        """Steps that were not believed."""
        return self._refit.refused

    def observe(self, plan: StepPlan, result: StepResult, now: float) -> bool:
        """Whether the model has changed."""
        if now - self._looked_at < LOOKED_AT_EVERY_S or result.duration_s <= 0.0 or not plan.rows:
            return False
        rows = [row for row in plan.rows if row.count == 1]
        if len(rows) == len(plan.rows):
            self._refit.observe_decode(_decode_sample(rows, result.duration_s))
        elif not rows:
            chunks = tuple(Chunk(tokens=row.count, past=row.start) for row in plan.rows)
            self._refit.observe_prefill(BatchSample(chunks=chunks, seconds=result.duration_s))
        else:
            return False
        self._looked_at = now
        self.current = self._refit.current()
        return True


def _decode_sample(rows: Sequence[StepRow], seconds: float) -> DecodeSample:
    return DecodeSample(sequences=len(rows), kv_tokens=sum(row.start + 1 for row in rows), seconds=seconds)
