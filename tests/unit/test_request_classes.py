"""Classes of requests: how they are written, what their requests may ask for, and which keys are bound to them."""

import pytest

from common.runtime.settings_classes import request_classes
from common.values.errors import InvalidRequest, SettingsError
from common.values.request_class import RequestClass
from services.gateway.http.api_keys import ApiKeys, split_key
from services.gateway.http.asgi import Scope
from services.gateway.http.http_settings import HttpSettings
from services.gateway.http.speed_wishes import SpeedWishes

QUICK = RequestClass(name="quick", ttft_s=0.5, tpot_s=0.05, late="refuse")
BATCH = RequestClass(name="batch", ttft_s=60.0)


def scope(**headers: str) -> Scope:
    return {"headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]}


def test_classes_are_read_from_settings() -> None:
    found = request_classes(["quick:ttft=500:tpot=50:late=refuse", "batch:ttft=60000"], ttft_s=2.0, tpot_s=None)
    assert found == (RequestClass(name="default", ttft_s=2.0), QUICK, BATCH)
    assert request_classes(["default:tpot=10"], ttft_s=2.0, tpot_s=None) == (RequestClass(name="default", tpot_s=0.01),)


@pytest.mark.parametrize("text", ["", ":ttft=1", "a:ttft=0", "a:ttft=x", "a:late=never", "a:size=3", "a:ttft=nan", "a b"])
def test_what_is_no_class_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--request-class takes"):
        request_classes([text], ttft_s=None, tpot_s=None)


def test_a_class_is_given_once() -> None:
    with pytest.raises(SettingsError, match="twice"):
        request_classes(["a:ttft=1", "a:ttft=2"], ttft_s=None, tpot_s=None)


def test_a_request_may_ask_for_less_than_its_class_has_and_never_for_more() -> None:
    wishes = SpeedWishes([QUICK, BATCH], ApiKeys([]))
    relaxed = wishes.of(scope(x_slo_class="quick", x_slo_ttft_ms="900"), "", None)
    assert (relaxed.ttft_s, relaxed.tpot_s, relaxed.late) == (0.9, 0.05, "refuse")
    for tight in ({"x_slo_ttft_ms": "499"}, {"x_slo_tpot_ms": "10"}):
        with pytest.raises(InvalidRequest, match="or more"):
            wishes.of(scope(x_slo_class="quick", **tight), "", None)
    assert wishes.of(scope(x_slo_class="batch", x_slo_tpot_ms="1"), "", None).tpot_s == 0.001, "the class says nothing of TPOT"


def test_headers_go_before_metadata() -> None:
    wishes = SpeedWishes([QUICK, BATCH], ApiKeys([]))
    metadata = {"slo_class": "batch", "slo_tpot_ms": "80", "other": 1}
    assert wishes.of(scope(), "", metadata).tpot_s == 0.08
    assert wishes.of(scope(x_slo_tpot_ms="70"), "", metadata).tpot_s == 0.07


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "1e12"])
def test_an_objective_is_a_time(value: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        SpeedWishes([], ApiKeys([])).of(scope(x_slo_ttft_ms=value), "", None)
    assert refused.value.param == "x-slo-ttft-ms"


def test_a_key_that_is_bound_to_a_class_has_that_one_only() -> None:
    keys = ApiKeys(["open", "fast class=quick"])
    wishes = SpeedWishes([RequestClass(name="default"), QUICK, BATCH], keys)
    fast, free = keys.check(b"Bearer fast"), keys.check(b"Bearer open")
    assert wishes.of(scope(), fast, None).request_class == "quick"
    assert wishes.of(scope(), free, None).request_class == "default"
    assert wishes.of(scope(x_slo_class="batch"), free, None).request_class == "batch"
    assert wishes.of(scope(), fast, None).account == fast != free
    with pytest.raises(InvalidRequest, match="of the class quick"):
        wishes.of(scope(x_slo_class="batch"), fast, None)
    with pytest.raises(InvalidRequest, match="no class"):
        wishes.of(scope(x_slo_class="slow"), free, None)
    assert split_key("a b class=c") == ("a b", "c")


def test_a_key_is_bound_to_a_class_that_is_there() -> None:
    HttpSettings(api_keys=("k class=quick",), classes=(QUICK,))
    with pytest.raises(SettingsError, match="bound to the class"):
        HttpSettings(api_keys=("k class=slow",), classes=(QUICK,))
