"""What a gateway promises and to whom: objectives, admission, shares of keys, and what of it goes to the workers."""

import pytest

from common.mesh.gateway_effects import Ended, SendDispatch
from common.mesh.promised_load import PromisedLoads
from common.policy.worker_outlook import PendingLoad
from common.values.errors import Overloaded
from common.values.ids import RequestId, WorkerId
from common.values.request_class import WantedSpeed
from common.values.sampling import SamplingParameters
from tests.gateway_driver import MODEL, Driver

HURRIED = WantedSpeed(request_class="quick", ttft_s=1e-6, tpot_s=10.0, late="refuse")


def begin(d: Driver, name: str, wanted: WantedSpeed, *, now: float = 0.0, prompt: tuple[int, ...] = (1, 2, 3)) -> SendDispatch:
    d.core.start(
        request_id=RequestId(name),
        model=MODEL,
        prompt=prompt,
        sampling=SamplingParameters(max_tokens=8, seed=1),
        choices=1,
        salt=b"",
        deadline=None,
        now=now,
        wanted=wanted,
    )
    [effect] = d.core.take_effects()
    assert isinstance(effect, SendDispatch)
    return effect


def test_objectives_that_nobody_named_follow_from_the_workers_steps() -> None:
    d = Driver()
    d.know("a", step_s=0.02)
    dispatch = begin(d, "r", WantedSpeed()).dispatch
    assert dispatch.tpot_s == pytest.approx(3 * 0.022), "three times a step of it alone"
    assert dispatch.ttft_left_s is not None
    assert dispatch.ttft_left_s > 0.1
    assert not dispatch.best_effort
    assert dispatch.expected_tokens == 4, "half of what it may make, before anything has ended"


def test_who_would_be_late_is_refused_or_served_behind_the_others_as_its_class_says() -> None:
    d = Driver()
    d.know("a")
    with pytest.raises(Overloaded) as refused:
        begin(d, "r", HURRIED)
    assert refused.value.retry_after_s >= 1.0
    assert d.core.active == 0
    assert d.core.take_effects() == []
    assert d.core.service.ended["quick", "refused"] == 1
    patient = WantedSpeed(request_class="quick", ttft_s=1e-6, tpot_s=10.0, late="best_effort")
    assert begin(d, "s", patient).dispatch.best_effort


def test_a_request_that_runs_is_placed_again_however_late_it_is() -> None:
    d = Driver()
    d.know("a")
    d.know("b")
    wanted = WantedSpeed(request_class="quick", ttft_s=1.0, tpot_s=10.0, late="refuse")
    first = begin(d, "r", wanted)
    d.answer(first.worker, "accepted")
    d.frame(first.worker, 0, 7, now=50.0)
    d.farewell(first.worker, now=60.0)
    again = [effect for effect in d.core.take_effects() if isinstance(effect, SendDispatch)]
    assert [effect.dispatch.attempt for effect in again] == [2]
    assert again[0].dispatch.ttft_left_s == 1.0, "as if it had just come: the mesh's fault does not put it behind the others"


def test_the_account_says_what_was_had() -> None:
    d = Driver()
    d.know("a")
    begin(d, "r", WantedSpeed(request_class="calm", ttft_s=5.0, tpot_s=1.0), now=1.0)
    d.answer("a", "accepted", now=1.0)
    d.frame("a", 0, 5, now=3.0)
    d.frame("a", 1, 6, 7, now=7.0, end=True)
    [ended] = [effect for effect in d.core.take_effects() if isinstance(effect, Ended)]
    assert ended.account is not None
    assert ended.account.had is not None
    assert (ended.account.had.ttft_s, ended.account.had.tpot_s) == (2.0, 2.0)
    assert (ended.account.in_time, ended.account.keeps_pace) == (True, False)
    assert d.core.service.ended["calm", "slow"] == 1


def test_a_key_that_had_far_more_than_the_others_gives_way_and_is_served() -> None:
    d = Driver()
    d.know("a")
    greedy, modest = WantedSpeed(account="greedy"), WantedSpeed(account="modest")
    assert not begin(d, "m", modest, prompt=(1,) * 50).dispatch.gives_way
    gave_way = [begin(d, f"g{i}", greedy, prompt=tuple(range(4000))).dispatch.gives_way for i in range(4)]
    assert gave_way == [False, False, False, True]
    assert not begin(d, "n", modest).dispatch.gives_way


def test_streams_on_their_way_count_at_their_decode_worker_until_their_first_token() -> None:
    d = Driver()
    d.know("p", role="prefill", peers=("d", "e"))
    d.know("d", role="decode", peers=("p",))
    d.know("e", role="decode", peers=("p",))
    assert [begin(d, name, WantedSpeed()).dispatch.decode_worker for name in ("r", "s", "t", "u")] == ["d", "e", "d", "e"]
    d.know("d", role="decode", peers=("p",))
    assert begin(d, "v", WantedSpeed()).dispatch.decode_worker == "d", "its snapshot cannot know of what is still prefilled"
    assert begin(d, "w", WantedSpeed()).dispatch.decode_worker == "e"


def test_promises_are_kept_once_and_forgotten() -> None:
    promised = PromisedLoads()
    one, worker = PendingLoad(sequences=1, context_tokens=10), WorkerId("d")
    promised.promise(RequestId("r"), worker, one)
    promised.promise(RequestId("s"), worker, one)
    promised.promise(RequestId("r"), WorkerId("e"), one)
    assert (promised.on(worker), promised.on(WorkerId("e")), len(promised)) == (one, one, 2)
    for name in ("r", "r", "s"):
        promised.settle(RequestId(name))
    assert (promised.on(worker), len(promised)) == (PendingLoad(), 0)
