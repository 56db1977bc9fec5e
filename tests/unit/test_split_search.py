"""The planner's search over made-up goodputs: it finds the best of all candidates, and looks at few of them closely."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.policy.closed_form import ClosedForm, ExpectedRequest, WorkerLimits
from common.simulation.goodput.distserve_preset import KV_TOKENS, opt_13b
from common.simulation.planning.candidate import Candidate, candidates
from common.simulation.planning.goodput_curve import crossing, draw_curve
from common.simulation.planning.split_search import SplitSearch
from common.simulation.planning.trial import Trial
from common.values.objectives import Objectives

LIMITS = WorkerLimits(kv_tokens=KV_TOKENS, max_sequences=512, batch_tokens=2048, step_tokens=256)
REQUEST = ExpectedRequest(prompt_tokens=755, output_tokens=200, objectives=Objectives(ttft_s=1.0, tpot_s=0.1))
FORM = ClosedForm(opt_13b(), LIMITS, [REQUEST])


def a_trial(rate: float, share: float) -> Trial:
    good = round(1000 * share)
    return Trial(rate=rate, requests=1000, good=good, late=1000 - good, slow=0, good_tokens=100 * good, least_class=share)


def searching(goodputs: dict[Candidate, float], workers: int) -> tuple[SplitSearch, list[Candidate]]:
    asked: list[Candidate] = []

    def attempt(candidate: Candidate, rate: float) -> Trial:
        asked.append(candidate)
        return a_trial(rate, min(1.0, max(0.0, 1.9 - rate / goodputs[candidate])))

    return SplitSearch(workers, FORM, attempt, wanted=0.9), asked


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.data())
def test_what_is_chosen_is_within_a_few_percent_of_the_best_where_each_kind_has_one_peak(workers: int, data: st.DataObject) -> None:
    goodputs: dict[Candidate, float] = {}
    peak = data.draw(st.integers(1, workers - 1))
    for candidate in candidates(workers):
        if candidate.kind == "colocated":
            goodputs[candidate] = data.draw(st.floats(1.0, 100.0))
        else:
            factor = 1.0 if candidate.kind == "split" else data.draw(st.floats(0.98, 1.1))
            goodputs[candidate] = 50.0 * 0.8 ** abs(candidate.prefill - peak) * factor
    search, asked = searching(goodputs, workers)
    best = search.best()
    assert goodputs[best] >= 0.95 * max(goodputs.values())
    assert len(asked) <= 80
    others = search.others(best)
    assert best not in others
    assert [search.knees[each].rate for each in others] == sorted((search.knees[each].rate for each in others), reverse=True)


def test_a_strict_split_is_kept_where_free_placement_gains_nothing() -> None:
    goodputs = {each: 40.0 if each.kind == "colocated" else 50.0 - abs(each.prefill - 3) for each in candidates(8)}
    search, _ = searching(goodputs, 8)
    assert search.best() == Candidate(kind="split", prefill=3, decode=5)
    above = search.trial_above(Candidate(kind="split", prefill=3, decode=5))
    assert above is not None
    assert above.rate > 49.0


def test_one_worker_is_not_split() -> None:
    alone = Candidate(kind="colocated", prefill=1)
    search, _ = searching({alone: 3.0}, 1)
    assert search.best() == alone
    assert search.knees[alone].rate == pytest.approx(3.0, rel=0.03)


def test_a_curve_says_where_it_crosses_and_how_surely() -> None:
    curve = draw_curve(lambda rate, seed: a_trial(rate, min(1.0, 1.9 - rate / (10.0 + seed))), 10.0, range(3), wanted=0.9)
    assert curve.low <= curve.goodput <= curve.high
    assert curve.low == pytest.approx(10.0, rel=0.02)
    assert curve.goodput == pytest.approx(11.0, rel=0.02)
    assert all(point.least <= point.attained <= point.most and point.low < point.high for point in curve.points)


def test_a_line_that_does_not_cross_ends_where_it_was_drawn() -> None:
    assert crossing([(1.0, 0.95), (2.0, 0.85)], 0.9) == pytest.approx(1.5)
    assert crossing([(1.0, 0.95), (2.0, 0.92)], 0.9) == 2.0
    assert crossing([(1.0, 0.8), (2.0, 0.7)], 0.9) == 1.0
