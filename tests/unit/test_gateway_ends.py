"""How a gateway ends requests that were cancelled or came too late, and silences what still runs, with literal times."""

import pytest

from common.mesh.gateway_effects import SendDispatch
from common.values.errors import (
    RequestFailed,
)
from tests.gateway_driver import Driver, R


def test_a_client_that_leaves_cancels_every_worker_that_may_hold_something() -> None:
    d = Driver()
    d.know("p", role="prefill", peers=("d",))
    d.know("d", role="decode")
    d.start()
    d.take()
    d.core.cancel(R, None, 0.1)
    assert d.cancels() == [("d", 1, None), ("p", 1, None)]
    assert d.ends() == [None]
    d.core.cancel(R, None, 0.1)
    d.core.cancel(R, 0, 0.1)
    assert d.take() == []


def test_one_choice_can_be_cancelled_and_the_last_one_ends_the_request() -> None:
    d = Driver()
    d.started("a", choices=2)
    d.core.cancel(R, 0, 0.1)
    assert d.cancels() == [("a", 1, [0])]
    d.frame("a", 0, 5, choice=0, now=0.2)
    d.frame("a", 0, 6, choice=1, now=0.2)
    assert d.delivered(0) == []
    assert d.delivered(1) == [6]
    d.core.cancel(R, 1, 0.3)
    assert d.cancels() == [("a", 1, None)]
    assert d.ends() == [None]


def test_a_frame_of_a_dead_attempt_is_answered_with_a_cancel_once_a_second() -> None:
    d = Driver()
    d.started("a", "b")
    d.silent_probes("a", 1, now=2.0)
    assert d.cancels() == [("a", 1, None)]
    d.frame("a", 0, 5, now=2.5)
    assert d.cancels() == [], "it was told just now"
    for step in range(20):
        d.frame("a", step, 5, now=3.5 + 0.02 * step)
    assert d.cancels() == [("a", 1, None)], "the first cancel was lost"
    d.frame("a", 30, 5, end=True, now=9.0)
    assert d.cancels() == [], "it has ended there"
    assert d.delivered() == []


def test_a_lost_cancel_of_a_request_that_is_over_is_repeated() -> None:
    d = Driver()
    d.started("a")
    d.core.cancel(R, None, 0.1)
    d.take()
    d.frame("a", 0, 5, now=0.5)
    assert d.cancels() == []
    d.frame("a", 1, 5, now=1.2)
    d.frame("a", 2, 5, now=1.3)
    assert d.cancels() == [("a", 1, None)]


def test_a_lost_cancel_of_one_choice_is_repeated_for_that_choice() -> None:
    d = Driver()
    d.started("a", choices=2)
    d.core.cancel(R, 0, 0.1)
    d.take()
    d.frame("a", 0, 5, choice=0, now=2.0)
    d.frame("a", 0, 5, choice=1, now=2.0)
    assert d.cancels() == [("a", 1, [0])]


def test_a_request_that_nobody_knows_is_cancelled_where_it_runs() -> None:
    d = Driver()
    d.frame("a", 0, 5, attempt=3, now=0.0)
    d.frame("a", 1, 5, attempt=3, now=0.1)
    assert d.cancels() == [("a", 3, None)]
    assert d.core.counters["stray_frames"] == 1


@pytest.mark.parametrize("accepted", [True, False])
def test_a_deadline_ends_the_request_and_cancels_its_workers(accepted: bool) -> None:
    d = Driver()
    d.know("a")
    d.start(deadline=5.0)
    (sent,) = [e.dispatch for e in d.take() if isinstance(e, SendDispatch)]
    assert sent.remaining_s == 5.0
    if accepted:
        d.answer("a", "accepted")
    d.tick(5.0)
    assert d.ends() == []
    d.core.on_tick(5.01)
    assert d.cancels() == [("a", 1, None)]
    error = d.error()
    assert isinstance(error, RequestFailed)
    assert (error.code, error.status) == ("deadline_exceeded", 504)


def test_a_deadline_holds_while_the_request_waits() -> None:
    d = Driver()
    d.know("a")
    d.start(deadline=5.0)
    d.answer("a", "accepted")
    d.silent_probes("a", 1, now=2.0)
    d.tick(5.1)
    assert isinstance(d.error(), RequestFailed)
