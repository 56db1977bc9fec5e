"""Bounds on silence: short for a quiet mesh, longer for slow steps and busy hosts, never without end."""

from hypothesis import given
from hypothesis import strategies as st

from common.policy.watchdog import LEAST_ANSWER_S, MOST_LOST_S, peer_silent_after_s, process_frozen_after_s, question_s, stream_bounds
from common.values.slo import Slo

SECONDS = st.floats(0.0, 100.0)


def test_a_second_and_four_steps_where_all_is_quiet() -> None:
    assert stream_bounds(Slo(), step_s=0.05, gap_s=0.5).lost_after_s == 1.2
    assert stream_bounds(Slo(tpot_s=0.01), step_s=0.0, gap_s=0.0).lost_after_s == 1.0
    assert stream_bounds(Slo(tpot_s=0.3), step_s=0.0, gap_s=0.0).lost_after_s == 3.0
    assert stream_bounds(Slo(), step_s=0.0, gap_s=2.0).lost_after_s == 4.0
    assert peer_silent_after_s(step_s=0.1) == 3.4


def test_a_process_is_replaced_only_after_gateways_and_peers_have_gone_around_it() -> None:
    assert peer_silent_after_s(step_s=0.0) < process_frozen_after_s() <= MOST_LOST_S
    assert stream_bounds(Slo(), step_s=0.1, gap_s=1.5).lost_after_s < process_frozen_after_s()


@given(tpot_s=SECONDS, step_s=SECONDS, gap_s=SECONDS)
def test_bounds_grow_with_what_they_come_from_and_end(tpot_s: float, step_s: float, gap_s: float) -> None:
    bounds = stream_bounds(Slo(tpot_s=tpot_s), step_s=step_s, gap_s=gap_s)
    assert 1.0 <= bounds.lost_after_s <= MOST_LOST_S
    assert bounds.answer_within_s < bounds.lost_after_s
    longer = stream_bounds(Slo(tpot_s=tpot_s), step_s=step_s + 1.0, gap_s=gap_s + 1.0)
    assert longer.lost_after_s >= bounds.lost_after_s


@given(tpot_s=SECONDS, step_s=SECONDS, gap_s=SECONDS, asked_after_s=st.floats(0.25, 0.5))
def test_the_last_question_ends_with_the_bound(tpot_s: float, step_s: float, gap_s: float, asked_after_s: float) -> None:
    """Who falls silent and is asked again and again is known to be lost at the bound, not one question later."""
    bounds = stream_bounds(Slo(tpot_s=tpot_s), step_s=step_s, gap_s=gap_s)
    silent_s = asked_after_s
    while silent_s <= bounds.lost_after_s:
        within_s = question_s(bounds, silent_s=silent_s)
        assert within_s >= LEAST_ANSWER_S
        silent_s += within_s
    assert silent_s < bounds.lost_after_s + 0.02
