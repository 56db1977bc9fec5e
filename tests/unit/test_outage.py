"""What clients are told while broker or store are away, with literal times."""

import pytest

from common.policy.outage import FIRST_RETRY_S, LONGEST_RETRY_S, PROBE_EVERY_S, Outage
from common.values.errors import BrokerUnavailable, InvalidRequest, StoreUnavailable
from services.gateway.admission import Admission


def test_the_wait_is_as_long_again_as_the_outage() -> None:
    outage = Outage()
    assert outage.retry_after_s(50.0) == FIRST_RETRY_S
    outage.failed(100.0)
    outage.failed(107.0)
    assert outage.retry_after_s(100.5) == FIRST_RETRY_S
    assert outage.retry_after_s(108.0) == 8.0
    assert outage.retry_after_s(1e6) == LONGEST_RETRY_S
    outage.worked()
    assert outage.retry_after_s(1e6) == FIRST_RETRY_S


def test_one_question_a_second_finds_out_when_it_is_back() -> None:
    outage = Outage()
    assert not outage.refuses(0.0)
    outage.failed(10.0)
    assert not outage.refuses(10.5), "a single failure is asked about again at once"
    outage.failed(10.5)
    assert outage.refuses(11.0)
    assert not outage.refuses(10.5 + PROBE_EVERY_S)
    outage.failed(11.5)
    assert outage.refuses(12.0)
    outage.worked()
    assert not outage.refuses(12.0)


def test_nothing_is_admitted_without_broker_or_store() -> None:
    admission = Admission()
    admission.check(broker_connected=True, now=1.0)
    with pytest.raises(BrokerUnavailable):
        admission.check(broker_connected=False, now=2.0)
    with pytest.raises(BrokerUnavailable) as refused:
        admission.check(broker_connected=False, now=6.0)
    assert refused.value.retry_after_s == 4.0
    admission.check(broker_connected=True, now=7.0)
    admission.observe_store(works=False, now=8.0)
    admission.check(broker_connected=True, now=8.1)
    admission.observe_store(works=False, now=8.2)
    with pytest.raises(StoreUnavailable):
        admission.check(broker_connected=True, now=8.5)
    admission.check(broker_connected=True, now=9.5)
    told = admission.told(StoreUnavailable("it is full"), 11.0)
    assert isinstance(told, StoreUnavailable)
    assert told.retry_after_s == 3.0
    assert str(told) == "it is full"
    admission.observe_store(works=True, now=12.0)
    admission.check(broker_connected=True, now=12.0)
    other = InvalidRequest("no")
    assert admission.told(other, 13.0) is other
