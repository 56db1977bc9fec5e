"""Failpoints fire once, at their pass, for the prompt that they name; a wrong one is refused with what there is."""

import pytest

from common.runtime.failpoints import POINTS, Failpoints
from common.values.errors import SettingsError
from common.values.sampling import SamplingParameters
from common.values.step import SequenceStart, StepPlan, StepRow


def passes_until_it_fires(points: Failpoints, point: str, tokens: tuple[int, ...] = ()) -> int | None:
    for number in range(1, 10):
        try:
            points.hit(point, tokens)
        except RuntimeError:
            return number
    return None


def test_a_point_fires_at_its_pass_and_only_once() -> None:
    points = Failpoints("pull.started=raise@3; last.sent=raise")
    assert passes_until_it_fires(points, "pull.done") is None
    assert passes_until_it_fires(points, "pull.started") == 3
    assert passes_until_it_fires(points, "pull.started") is None
    assert passes_until_it_fires(points, "last.sent") == 1


def test_only_passes_of_the_prompt_with_the_token_count() -> None:
    points = Failpoints("dispatch.accepted=raise@2,token=17")
    assert passes_until_it_fires(points, "dispatch.accepted", (1, 2)) is None
    assert passes_until_it_fires(points, "dispatch.accepted", (17,)) == 2


def test_a_step_knows_the_prompts_of_its_rows() -> None:
    start = SequenceStart(
        handle=4, choice=0, prompt_length=2, tokens=(7, 17, 99), sampling=SamplingParameters(max_tokens=4, seed=1), eos_token_ids=()
    )
    rows = [StepRow(handle=4, start=first, count=count, blocks=(0,), sample=True) for first, count in ((0, 3), (3, 1))]
    for token, fires in ((17, True), (99, False)):
        points = Failpoints(f"decode.step=raise,token={token}")
        points.step(StepPlan(number=1, rows=(rows[0],), starts=(start,)))
        if fires:
            with pytest.raises(RuntimeError):
                points.step(StepPlan(number=2, rows=(rows[1],)))
        else:
            points.step(StepPlan(number=2, rows=(rows[1],)))


def test_a_position_is_met_in_whichever_step_computes_it() -> None:
    start = SequenceStart(
        handle=4, choice=0, prompt_length=2, tokens=(7, 17), sampling=SamplingParameters(max_tokens=9, seed=1), eos_token_ids=()
    )
    for first, count in ((5, 1), (0, 8)):
        points = Failpoints("step.position=raise,token=17,at=5")
        points.step(StepPlan(number=1, rows=(StepRow(handle=4, start=0, count=5, blocks=(0,), sample=False),), starts=(start,)))
        with pytest.raises(RuntimeError):
            points.step(StepPlan(number=2, rows=(StepRow(handle=4, start=first, count=count, blocks=(0,), sample=True),)))


def test_each_preemption_is_a_pass() -> None:
    points = Failpoints("preempted=raise@3")
    points.preempted(2)
    points.preempted(2)
    with pytest.raises(RuntimeError):
        points.preempted(4)


def test_a_pause_is_told_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    Failpoints("last.sent=pause,ms=1").hit("last.sent")
    assert [record.message for record in caplog.records] == ["failpoint"]


@pytest.mark.parametrize(
    "text",
    [
        "nowhere=kill",
        "pull.started=explode",
        "pull.started",
        "pull.started=kill@x",
        "pull.done=kill,token=a",
        "last.sent=pause,minutes=1",
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(text: str) -> None:
    with pytest.raises(SettingsError, match=POINTS[0]):
        Failpoints(text)
