"""How a gateway places a request, and what becomes of dispatches, said with literal events and times."""

import pytest

from common.mesh.gateway_effects import Accepted, SendDispatch
from common.values.errors import (
    BrokerUnavailable,
    ContextTooLong,
    InvalidRequest,
    NeverFits,
    Overloaded,
    PayloadTooLarge,
    SegueError,
    StoreUnavailable,
    Unavailable,
)
from tests.gateway_driver import Driver, R


def test_a_request_is_placed_accepted_and_ends_with_its_last_token() -> None:
    d = Driver()
    d.know("a")
    d.start()
    assert d.dispatches() == [("a", 1)]
    d.answer("a", "accepted")
    assert d.take() == [Accepted(request_id=R)]
    d.frame("a", 0, 5, 6, now=0.1)
    d.frame("a", 2, 7, end=True, now=0.2)
    assert d.delivered() == [5, 6, 7]
    assert d.ends() == [None]
    assert d.core.active == 0
    assert d.core.get_timer(0.2) is None


def test_a_frame_accepts_before_the_answer_does() -> None:
    d = Driver()
    d.know("a")
    d.start()
    d.frame("a", 0, 5, now=0.1)
    d.answer("a", "accepted", now=0.1)
    d.answer("a", None, now=2.0)
    assert [e for e in d.take() if isinstance(e, Accepted)] == [Accepted(request_id=R)]
    assert d.delivered() == [5]


def test_without_a_ready_worker_nothing_starts() -> None:
    d = Driver()
    with pytest.raises(Unavailable):
        d.start()
    assert d.core.active == 0


def test_an_unanswered_dispatch_is_probed_and_a_queued_sequence_is_accepted() -> None:
    d = Driver()
    d.know("a")
    d.start()
    d.answer("a", None, now=2.0)
    assert d.probes(2.0) == [("a", [0])]
    d.replay("a", "queued", now=2.1)
    assert d.take() == [Accepted(request_id=R)]


def test_an_unanswered_dispatch_that_is_unknown_is_placed_again() -> None:
    d = Driver()
    d.know("a")
    d.start()
    d.answer("a", None, now=2.0)
    d.probes(2.0)
    d.replay("a", "unknown", now=2.1)
    assert d.dispatches() == [("a", 2)]
    assert d.core.counters["unknown"] == 1
    assert d.core.counters["workers_lost"] == 0


def test_a_new_request_that_meets_a_silent_broker_is_turned_away() -> None:
    d = Driver()
    d.know("a")
    d.start()
    d.answer("a", None, now=2.0)
    d.probes(2.0)
    d.replay("a", None, now=3.0, broker_alive=False)
    assert isinstance(d.error(), BrokerUnavailable)
    assert d.core.active == 0


def test_an_accepted_request_outlives_a_silent_broker_and_is_probed_once_that_is_back() -> None:
    d = Driver()
    d.started("a", "b")
    d.probes(2.0)
    d.replay("a", None, now=3.0, broker_alive=False)
    assert d.probes(3.1) == []
    assert d.probes(3.3) == [("a", [0])]


def test_a_full_worker_is_passed_over_and_full_everywhere_is_429() -> None:
    d = Driver()
    d.know("a")
    d.know("b")
    d.start()
    d.answer("a", "full")
    assert d.dispatches() == [("a", 1), ("b", 2)]
    d.answer("b", "full", attempt=2)
    assert d.dispatches() == [("a", 3)]
    d.answer("a", "full", attempt=3)
    error = d.error()
    assert isinstance(error, Overloaded)
    assert error.status == 429
    assert d.core.counters["dispatch_full"] == 3


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("context_length_exceeded", ContextTooLong),
        ("kv_cache_too_small", NeverFits),
        ("invalid_request", InvalidRequest),
        ("something newer", InvalidRequest),
        ("unavailable", Unavailable),
    ],
)
def test_a_refusal_is_the_clients_error_or_a_retryable_one(code: str, kind: type[SegueError]) -> None:
    d = Driver()
    d.know("a")
    d.start()
    d.answer("a", "refused", code=code)
    error = d.error()
    assert type(error) is kind
    assert str(error) == "why"


def test_a_running_request_that_one_worker_refuses_goes_to_another() -> None:
    """It ran elsewhere before: the next worker may have a smaller pool, or read no record now."""
    d = Driver()
    d.started("a", "b", "c")
    d.frame("a", 0, 5, now=0.1)
    d.farewell("a", 0.2)
    d.answer("b", "refused", attempt=2, code="kv_cache_too_small", now=0.7)
    assert d.dispatches() == [("b", 2), ("c", 3)]
    d.answer("c", "refused", attempt=3, code="kv_cache_too_small", now=0.8)
    d.answer("b", "refused", attempt=4, code="kv_cache_too_small", now=0.9)
    assert isinstance(d.error(), NeverFits)


@pytest.mark.parametrize("error", [BrokerUnavailable("away"), StoreUnavailable("away"), PayloadTooLarge("large")])
def test_a_new_request_whose_dispatch_cannot_be_sent_is_turned_away(error: SegueError) -> None:
    d = Driver()
    d.know("a")
    d.start()
    d.core.abort(R, 1, error, 0.0)
    assert d.ends() == [error]


def test_a_running_request_whose_dispatch_cannot_be_sent_waits_for_its_probe() -> None:
    d = Driver()
    d.started("a")
    d.replay("a", "unknown", now=0.3)
    d.core.abort(R, 2, BrokerUnavailable("away"), 0.3)
    assert d.probes(0.4) == []
    assert d.probes(0.6) == [("a", [0])]
    d.replay("a", "unknown", attempt=2, now=0.6)
    assert d.dispatches() == [("a", 3)]


def test_a_running_request_that_no_dispatch_can_carry_ends() -> None:
    d = Driver()
    d.started("a")
    d.replay("a", "unknown", now=0.3)
    d.core.abort(R, 2, PayloadTooLarge("large"), 0.3)
    assert isinstance(d.error(), PayloadTooLarge)


def test_a_recovery_brings_the_tokens_of_unfinished_choices_only() -> None:
    d = Driver()
    d.started("a", choices=3)
    d.frame("a", 0, 5, 6, now=0.1)
    d.frame("a", 0, 7, choice=1, end=True, now=0.1)
    d.core.cancel(R, 2, 0.1)
    d.replay("a", "unknown", now=0.4)
    (sent,) = [e.dispatch for e in d.take() if isinstance(e, SendDispatch)]
    assert [(state.choice, state.tokens) for state in sent.choices] == [(0, [5, 6])]
