"""What steps cost: one in which the process was frozen counts as a slow one; what really became slower is followed."""

import pytest

from common.runtime.step_meter import MOST_TIMES, WEIGHT, StepMeter
from common.values.step import StepPlan, StepResult, StepRow

DECODE = StepPlan(number=1, rows=(StepRow(handle=1, start=5, count=1, blocks=(0,), sample=True),))
PREFILL = StepPlan(number=1, rows=(StepRow(handle=1, start=0, count=10, blocks=(0,), sample=True),))


def took(seconds: float) -> StepResult:
    return StepResult(number=1, rows=(), duration_s=seconds)


def test_a_frozen_step_is_no_measure_of_steps() -> None:
    meter = StepMeter()
    meter.observe(DECODE, took(0.01))
    meter.observe(DECODE, took(8.0))
    assert meter.seconds_per_step == pytest.approx(0.01 * (1 + WEIGHT * (MOST_TIMES - 1)))
    meter.observe(PREFILL, took(0.1))
    meter.observe(PREFILL, took(8.0))
    assert meter.seconds_per_prefill_token < 2 * 0.01


def test_steps_that_became_a_hundred_times_slower_are_followed() -> None:
    meter = StepMeter()
    meter.observe(DECODE, took(0.01))
    for _ in range(20):
        meter.observe(DECODE, took(1.0))
    assert meter.seconds_per_step > 0.9
