"""How a gateway notices gaps, silence and lost workers, and places requests again, said with literal events and times."""

import pytest

from common.mesh.gateway_attempts import FULL_RETRY_S, PATIENCE_S
from common.mesh.gateway_effects import SendDispatch, SendReplay
from common.mesh.gateway_probes import MAX_ITEMS, MAX_UNANSWERED
from common.values.errors import (
    BrokerUnavailable,
    Overloaded,
    RequestFailed,
    Unavailable,
)
from common.values.ids import RequestId, WorkerId
from common.values.sampling import SamplingParameters
from common.values.tokens import DEADLINE_CODE, Ending, NewTokens
from tests.gateway_driver import MODEL, Driver


def test_a_gap_is_probed_after_50_ms() -> None:
    d = Driver()
    d.started("a")
    d.frame("a", 0, 5, now=1.0)
    d.frame("a", 2, 7, now=1.2)
    assert d.probes(1.24) == []
    assert d.probes(1.26) == [("a", [0])]
    d.replay("a", "running", now=1.27, new=NewTokens(first=1, tokens=(6,)))
    assert d.delivered() == [5, 6, 7]


def test_frames_behind_a_gap_do_not_put_its_probe_off() -> None:
    d = Driver()
    d.started("a")
    for step in range(5):
        d.frame("a", 1 + step, 6, now=1.0 + 0.02 * step)
    assert d.probes(1.06) == [("a", [0])]


@pytest.mark.parametrize(("step_s", "patience_s"), [(0.0, 0.25), (0.02, 0.25), (0.5, 2.0)])
def test_silence_is_probed_after_250_ms_or_four_steps(step_s: float, patience_s: float) -> None:
    d = Driver()
    d.started("a")
    d.know("a", 0.0, step_s=step_s)
    d.frame("a", 0, 5, now=1.0)
    d.know("a", 1.0 + patience_s, step_s=step_s)
    assert d.probes(1.0 + patience_s - 0.01) == []
    assert d.probes(1.0 + patience_s + 0.01) == [("a", [0])]


def test_one_probe_of_a_choice_is_under_way_at_a_time() -> None:
    d = Driver()
    d.started("a", choices=2)
    d.frame("a", 0, 5, choice=1, now=0.2)
    assert d.probes(0.3) == [("a", [0])]
    assert d.probes(0.35) == []
    assert d.probes(0.5) == [("a", [1])]
    d.replay("a", None, choice=0, now=0.6)
    assert d.probes(0.65) == [("a", [0])]
    d.replay("a", "running", choice=1, now=0.7)
    assert d.probes(0.7) == []
    assert d.probes(1.0) == [("a", [1])]


def test_the_probes_of_one_worker_go_together_in_pages() -> None:
    d = Driver()
    d.know("a")
    for number in range(MAX_ITEMS // 100 + 1):
        d.core.start(
            request_id=RequestId(f"r{number}"),
            model=MODEL,
            prompt=(1,),
            sampling=SamplingParameters(max_tokens=4, seed=1),
            choices=100,
            salt=b"",
            deadline=None,
            now=0.0,
        )
        d.core.abort(RequestId(f"r{number}"), 7, BrokerUnavailable("of no attempt"), 0.0)
        for choice in range(100):
            d.frame("a", 0, 5, choice=choice, now=0.0, request=f"r{number}")
    sizes = [len(e.items) for e in d.tick(1.0) if isinstance(e, SendReplay)]
    assert sizes == [MAX_ITEMS, 1100 - MAX_ITEMS]


def test_what_has_moved_is_asked_for_at_its_new_worker() -> None:
    d = Driver()
    d.know("p", role="prefill", peers=("d",))
    d.know("d", role="decode")
    d.start()
    (sent,) = [e for e in d.take() if isinstance(e, SendDispatch)]
    assert (sent.worker, sent.dispatch.decode_worker) == ("p", "d")
    d.answer("p", "accepted")
    assert d.probes(0.3) == [("p", [0])]
    d.replay("p", "moved", now=0.3, new=NewTokens(first=0, tokens=(5,)), moved_to="d")
    assert d.delivered() == [5]
    assert d.probes(0.6) == [("d", [0])]


def test_an_answer_of_the_old_worker_does_not_turn_the_probe_back() -> None:
    d = Driver()
    d.started("a", "b")
    d.probes(0.3)
    d.frame("b", 0, 5, now=0.3)
    d.replay("a", "moved", now=0.35, moved_to="c")
    assert d.probes(0.65) == [("b", [0])]
    d.frame("b", 1, 6, now=0.7)
    d.replay("a", "unknown", now=0.7)
    assert d.dispatches() == []


def test_an_unknown_sequence_is_placed_again_and_nobody_is_blamed() -> None:
    d = Driver()
    d.started("a")
    d.frame("a", 0, 5, now=0.1)
    for attempt in range(1, 10):
        d.replay("a", "unknown", attempt=attempt, now=float(attempt))
        assert d.dispatches()[-1] == ("a", attempt + 1)
    assert d.core.counters["unknown"] == 9
    assert d.core.counters["workers_lost"] == 0


def test_a_worker_that_is_silent_for_its_bound_and_leaves_a_probe_unanswered_is_lost() -> None:
    d = Driver()
    d.started("a", "b")
    d.silent_probes("a", 3, now=0.95)
    assert d.dispatches() == []
    d.silent_probes("a", 1, now=1.05)
    assert d.dispatches() == [("b", 2)]
    assert d.core.counters["workers_lost"] == 1


def test_slow_steps_make_the_bound_longer() -> None:
    d = Driver()
    d.know("a", step_s=0.5)
    d.know("b")
    d.start()
    d.answer("b", "refused", code="wrong_model")
    d.answer("a", "accepted", attempt=2)
    d.take()
    d.silent_probes("a", 1, attempt=2, now=2.9)
    assert d.dispatches() == []


def test_who_runs_an_announced_suspect_gets_longer_to_answer() -> None:
    d = Driver()
    d.started("a", "b")
    d.silent_probes("a", 1, now=1.1)
    d.notice("b", "suspect", attempt=2, now=1.1)
    d.silent_probes("b", 1, attempt=2, now=7.6)
    assert d.ends() == []
    d.silent_probes("b", 1, attempt=2, now=7.8)
    assert isinstance(d.error(), RequestFailed)


def test_a_worker_that_is_still_heard_may_answer_slowly() -> None:
    d = Driver()
    d.started("a", "b")
    d.know("a", 2.0)
    d.silent_probes("a", MAX_UNANSWERED - 1, now=2.5)
    assert d.dispatches() == []
    d.silent_probes("a", 1, now=2.5)
    assert d.dispatches() == [("b", 2)]


def test_an_answer_clears_the_worker_that_gave_it_and_no_other() -> None:
    d = Driver()
    d.started("a", "b", choices=2)
    d.frame("b", 0, 5, choice=1, now=0.1)
    d.know("a", 2.0)
    d.silent_probes("a", MAX_UNANSWERED - 1, now=2.0)
    d.frame("b", 1, 6, choice=1, now=2.0)
    d.replay("b", "running", choice=1, now=2.0)
    assert d.dispatches() == []
    d.silent_probes("a", 1, now=2.0)
    assert [attempt for _, attempt in d.dispatches()] == [2]
    d.frame("b", 0, 5, attempt=2, now=2.1)
    d.silent_probes("b", MAX_UNANSWERED - 1, attempt=2, now=2.2)
    d.frame("b", 1, 6, attempt=2, now=2.2)
    d.silent_probes("b", MAX_UNANSWERED - 1, attempt=2, now=2.2)
    assert d.dispatches() == []


def test_what_a_worker_had_left_at_its_farewell_is_placed_again_and_nothing_was_lost() -> None:
    d = Driver()
    d.started("a", "b")
    d.farewell("a", 0.2)
    (again,) = [effect.dispatch for effect in d.take() if isinstance(effect, SendDispatch)]
    assert (again.attempt, again.suspect) == (2, False)
    assert d.core.counters["workers_lost"] == 0


def test_what_is_handed_back_is_placed_elsewhere_and_what_has_moved_is_asked_there() -> None:
    d = Driver()
    d.started("a", "b", choices=2)
    d.know("c")
    d.notice("a", "moved", choice=1, moved_to="b", now=0.1)
    assert d.probes(1.0) == [("a", [0]), ("b", [1])]
    d.notice("a", "handed_back", now=1.0)
    (again,) = [effect for effect in d.take() if isinstance(effect, SendDispatch)]
    assert again.worker != "a"
    assert [again.dispatch.attempt, again.dispatch.suspect, len(again.dispatch.choices)] == [2, False, 2]
    d.notice("a", "handed_back", now=1.1)
    assert d.dispatches() == []


def test_choices_that_are_handed_back_join_the_siblings_that_decode_elsewhere() -> None:
    d = Driver()
    d.know("p", role="prefill", peers=("d", "e"))
    d.know("d", role="decode", peers=("p",))
    d.start(choices=2)
    d.answer("p", "accepted")
    d.take()
    for name in ("e", "f"):
        d.know(name, role="decode", peers=("p",))
    d.notice("p", "handed_back", choice=1, moved_to="d", now=0.1)
    (again,) = [effect for effect in d.take() if isinstance(effect, SendDispatch)]
    assert (again.worker, again.dispatch.decode_worker, len(again.dispatch.choices)) == ("d", None, 2)
    assert not again.dispatch.suspect


def test_who_was_lost_with_the_siblings_of_what_is_handed_back_is_the_first_loss() -> None:
    """It may be back already, under a new incarnation: what it had is gone."""
    d = Driver()
    d.know("p", role="prefill", peers=("d",))
    d.know("d", role="decode", peers=("p",))
    d.start(choices=2)
    d.answer("p", "accepted")
    d.take()
    d.know("d", 0.1, role="decode", peers=("p",), incarnation="2")
    d.notice("p", "handed_back", choice=1, moved_to="d", now=0.2)
    (again,) = [effect for effect in d.take() if isinstance(effect, SendDispatch)]
    assert again.dispatch.suspect
    assert d.core.counters["workers_lost"] == 1


def test_a_move_that_is_heard_late_was_to_the_life_that_was_placed_there() -> None:
    d = Driver()
    d.know("p", role="prefill", peers=("d",))
    d.know("d", role="decode", peers=("p",))
    d.start()
    d.answer("p", "accepted")
    d.know("d", 0.1, role="decode", peers=("p",), incarnation="2")
    d.notice("p", "moved", moved_to="d", now=0.2)
    d.replay("d", "unknown", incarnation="2", now=0.3)
    assert d.core.counters["workers_lost"] == 1


def test_a_worker_that_serves_another_model_by_now_is_forgotten_and_the_request_placed_again() -> None:
    d = Driver()
    d.know("a")
    d.know("b")
    d.start()
    d.answer("a", "refused", code="wrong_model")
    assert d.dispatches() == [("a", 1), ("b", 2)]
    assert d.core.registry.get(WorkerId("a")) is None


def test_a_deadline_that_a_worker_kept_is_told_as_the_requests_error() -> None:
    d = Driver()
    d.started("a")
    d.frame("a", 0, 5, now=0.1)
    late = NewTokens(first=1, tokens=(), ending=Ending(reason="error", error_code=DEADLINE_CODE))
    d.replay("a", "ended", new=late, now=0.5)
    error = d.error()
    assert isinstance(error, RequestFailed)
    assert (error.code, error.status) == (DEADLINE_CODE, 504)
    assert d.delivered() == [5]


def test_silence_does_not_count_while_the_broker_is_silent_itself() -> None:
    d = Driver()
    d.started("a", "b")
    for second in range(10):
        d.replay("a", None, now=3.0 + second, broker_alive=False)
    d.silent_probes("a", 3, now=12.9)
    assert d.dispatches() == []
    d.silent_probes("a", 1, now=13.1)
    assert d.dispatches() == [("b", 2)]


def test_only_the_announced_suspect_is_charged_and_its_second_worker_is_its_last() -> None:
    d = Driver()
    d.started("a", "b", "c", "e")
    d.silent_probes("a", 1, now=2.0)
    d.silent_probes("b", 1, attempt=2, now=2.0)
    again = [e.dispatch for e in d.take() if isinstance(e, SendDispatch)]
    assert [dispatch.suspect for dispatch in again] == [True, True]
    d.notice("c", "suspect", attempt=3, now=2.0)
    d.notice("c", "cleared", attempt=3, now=2.0)
    d.silent_probes("c", 1, attempt=3, now=20.0)
    assert d.ends() == []
    d.notice("e", "suspect", attempt=3, now=2.0)
    d.notice("e", "suspect", attempt=4, now=2.0)
    d.silent_probes("e", 1, attempt=4, now=20.0)
    error = d.error()
    assert isinstance(error, RequestFailed)
    assert (error.code, error.status) == ("request_poisoned", 502)
    assert d.core.counters["workers_lost"] == 4


def test_a_new_token_is_the_proof_of_innocence() -> None:
    d = Driver()
    d.started("a", "b", "c")
    d.silent_probes("a", 1, now=2.0)
    d.notice("b", "suspect", attempt=2, now=2.0)
    d.frame("b", 0, 5, attempt=2, now=2.1)
    d.silent_probes("b", 1, attempt=2, now=20.0)
    assert d.ends() == []
    assert [e.dispatch.suspect for e in d.log if isinstance(e, SendDispatch)] == [False, True, True]


def test_a_new_incarnation_of_a_worker_says_that_the_old_one_is_lost() -> None:
    d = Driver()
    d.started("a", "b")
    d.know("a", 0.1, incarnation="2")
    assert d.probes(0.1) == [("a", [0])]
    d.replay("a", "unknown", now=0.1, incarnation="2")
    assert d.dispatches() == [("b", 2)]
    assert d.core.counters["workers_lost"] == 1


def test_when_the_only_worker_is_lost_the_request_waits_for_its_return() -> None:
    d = Driver()
    d.started("a")
    d.frame("a", 0, 5, now=0.1)
    d.silent_probes("a", 1, now=2.0)
    assert d.dispatches() == []
    assert d.tick(10.0) == []
    d.know("a", 11.0)
    assert d.dispatches() == [("a", 2)]
    d.answer("a", "accepted", attempt=2, now=11.0)
    d.frame("a", 1, 6, attempt=2, end=True, now=11.1)
    assert d.delivered() == [5, 6]
    assert d.ends() == [None]


def test_where_no_worker_comes_back_the_request_ends_after_its_patience() -> None:
    d = Driver()
    d.started("a")
    d.silent_probes("a", 1, now=2.0)
    d.tick(2.0 + PATIENCE_S)
    assert d.ends() == []
    d.tick(2.1 + PATIENCE_S)
    assert isinstance(d.error(), Unavailable)


def test_while_a_request_waits_old_probes_do_not_count_again() -> None:
    d = Driver()
    d.started("a", choices=2)
    d.silent_probes("a", 1, now=2.0)
    d.replay("a", None, choice=1, now=2.0)
    d.replay("a", "unknown", choice=1, now=2.0)
    assert d.core.counters["workers_lost"] == 1
    d.know("a", 3.0)
    assert d.dispatches() == [("a", 2)]


def test_a_token_of_a_worker_taken_for_lost_is_still_taken_while_nobody_else_is_there() -> None:
    d = Driver()
    d.started("a")
    d.silent_probes("a", 1, now=2.0)
    d.frame("a", 0, 5, now=2.5)
    d.frame("a", 1, 6, end=True, now=2.6)
    assert d.delivered() == [5, 6]
    assert d.ends() == [None]


def test_a_running_request_waits_while_every_queue_is_full() -> None:
    """Its tokens are out already: a moment of load is no reason to end it, nor to ask over and over."""
    d = Driver()
    d.started("a", "b")
    d.frame("a", 0, 5, now=0.1)
    d.replay("a", "unknown", now=1.0)
    for worker, attempt in (("b", 2), ("a", 3), ("b", 4)):
        assert d.dispatches() == [(worker, attempt)]
        d.answer(worker, "full", attempt=attempt, now=1.0)
    d.know("a", 1.0)
    assert d.dispatches() == []
    d.tick(1.0 + FULL_RETRY_S - 0.01)
    assert d.ends() == []
    d.core.on_tick(1.0 + FULL_RETRY_S)
    assert d.dispatches() == [("a", 5)]
    d.answer("a", "full", attempt=5, now=1.3)
    assert d.dispatches() == [("b", 6)], "each worker is asked again"
    d.answer("b", "accepted", attempt=6, now=1.3)
    d.frame("b", 1, 6, attempt=6, end=True, now=1.4)
    assert d.delivered() == [5, 6]


def test_a_worker_is_told_whether_another_had_accepted_before() -> None:
    """Only that passes the bound of its queue: a new request that was full elsewhere does not."""
    d = Driver()
    d.know("a")
    d.know("b")
    d.start()
    told = [e.dispatch.accepted_before for e in d.take() if isinstance(e, SendDispatch)]
    d.answer("a", "full")
    told += [e.dispatch.accepted_before for e in d.take() if isinstance(e, SendDispatch)]
    d.answer("b", "accepted", attempt=2)
    d.replay("b", "unknown", attempt=2, now=1.0)
    told += [e.dispatch.accepted_before for e in d.take() if isinstance(e, SendDispatch)]
    assert told == [False, False, True]


def test_a_running_request_does_not_wait_for_room_forever() -> None:
    d = Driver()
    d.started("a")
    d.replay("a", "unknown", now=0.0)
    now, most = 0.0, 0
    while now < 2 * PATIENCE_S and d.core.active:
        for worker, attempt in d.dispatches():
            d.answer(worker, "full", attempt=attempt, now=now)
            most = attempt
        now += 0.05
        d.know("a", now)
        d.core.on_tick(now)
    assert isinstance(d.error(), Overloaded)
    assert PATIENCE_S < now < PATIENCE_S + 1.0
    assert most <= 1 + 3 * PATIENCE_S / FULL_RETRY_S


@pytest.mark.parametrize(("choices", "decode_workers"), [(1, ["d", "d"]), (2, ["d", None])])
def test_choices_of_a_request_that_lost_a_worker_stay_together(choices: int, decode_workers: list[str | None]) -> None:
    """So that they take down one more at most, which announced them."""
    d = Driver()
    for prefill in ("p", "q"):
        d.know(prefill, role="prefill", peers=("d",))
    d.know("d", role="decode", peers=("p", "q"))
    d.start(choices=choices)
    d.answer("p", "accepted")
    d.know("q", 1.9, role="prefill", peers=("d",))
    d.know("d", 1.9, role="decode", peers=("p", "q"))
    d.silent_probes("p", 1, now=2.0)
    dispatched = [effect.dispatch for effect in d.log if isinstance(effect, SendDispatch)]
    dispatched += [effect.dispatch for effect in d.take() if isinstance(effect, SendDispatch)]
    assert [dispatch.decode_worker for dispatch in dispatched] == decode_workers
