"""When a model step counts as hung, said with literal times."""

from common.runtime.step_meter import StepMeter
from common.runtime.step_watch import LEAST_BOUND_S, TIMES_PREDICTED, UNMEASURED_BOUND_S, StepWatch
from common.values.step import StepPlan, StepResult, StepRow


def plan(*counts: int) -> StepPlan:
    rows = tuple(StepRow(handle=i, start=0, count=count, blocks=(i,), sample=True) for i, count in enumerate(counts))
    return StepPlan(number=1, rows=rows)


def meter(*, per_step: float, per_token: float) -> StepMeter:
    measured = StepMeter()
    measured.observe(plan(1), StepResult(number=1, rows=(), duration_s=per_step))
    measured.observe(plan(100), StepResult(number=2, rows=(), duration_s=100 * per_token))
    return measured


def test_only_the_step_that_computes_can_hang() -> None:
    watch = StepWatch(meter(per_step=0.01, per_token=0.001))
    assert not watch.hangs(1e9)
    watch.began(plan(1), 100.0)
    assert not watch.hangs(100.0 + LEAST_BOUND_S)
    assert watch.hangs(100.1 + LEAST_BOUND_S)
    watch.ended()
    assert not watch.hangs(1e9)


def test_the_bound_grows_with_what_the_step_should_cost() -> None:
    watch = StepWatch(meter(per_step=2.0, per_token=0.5))
    assert watch.bound_s(plan(1)) == TIMES_PREDICTED * 2.0
    assert watch.bound_s(plan(10, 1)) == TIMES_PREDICTED * 7.0


def test_what_was_never_measured_gets_much_time() -> None:
    assert StepWatch(StepMeter()).bound_s(plan(1)) == UNMEASURED_BOUND_S
    only_decode = StepMeter()
    only_decode.observe(plan(1), StepResult(number=1, rows=(), duration_s=0.01))
    assert StepWatch(only_decode).bound_s(plan(50)) == UNMEASURED_BOUND_S
    assert StepWatch(only_decode).bound_s(plan(1)) == LEAST_BOUND_S
