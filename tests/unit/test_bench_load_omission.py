"""A stall cannot hide ("coordinated omission"): an open loop goes on sending, and latencies count from the scheduled send.

In virtual time: a loop whose clock jumps to the next timer instead of waiting for it.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from tools.bench_load.answer_reader import AnswerReader
from tools.bench_load.arrivals import Constant, PlannedRequest, closed_loop, open_loop
from tools.bench_load.http_client import Answer
from tools.bench_load.point_run import PointRun, Progress
from tools.bench_load.request_class import RequestClass
from tools.bench_load.request_result import RequestResult

STALL_BEGINS, STALL_ENDS, SERVICE_S = 1.0, 6.0, 0.05
ONE = [RequestClass(name="a", prompt_tokens=1, output_tokens=1)]


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        return self.now


class _Jumping(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "nothing will ever happen"
        self._loop.now += max(0.0, timeout)
        return super().select(0)


class StallingServer:
    """One request at a time, each in `SERVICE_S`, and nothing at all during the stall."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._free_at = 0.0

    async def stream(self, request: bytes) -> Answer:
        ends = max(self._clock(), self._free_at) + SERVICE_S
        if STALL_BEGINS < ends < STALL_ENDS:
            ends = STALL_ENDS + SERVICE_S
        self._free_at = ends
        await asyncio.sleep(ends - self._clock())
        now = self._clock()
        return Answer(status=200, reader=AnswerReader(arrivals=[now], is_done=True), ended=now)


class BlockingClient(StallingServer):
    """Its third request blocks the whole client for two seconds before it is sent."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__(loop.time)
        self._loop = loop
        self._asked = 0

    async def stream(self, request: bytes) -> Answer:
        self._asked += 1
        if self._asked == 3:
            self._loop.now += 2.0
        return Answer(status=200, reader=AnswerReader(arrivals=[self._clock()], is_done=True), ended=self._clock())


def in_virtual_time(run: Callable[[VirtualLoop], Coroutine[Any, Any, list[RequestResult]]]) -> list[RequestResult]:
    loop = VirtualLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(run(loop))


def a_run(plan: Sequence[PlannedRequest], client: StallingServer, loop: VirtualLoop, *, timeout_s: float = 100.0) -> PointRun:
    return PointRun(plan, [b""] * len(plan), client, loop.time, timeout_s=timeout_s, on_progress=_ignore)


def _ignore(progress: Progress) -> None:
    assert progress.ended <= progress.sent <= progress.planned


def test_an_open_loop_sees_the_stall_in_every_request_that_it_delayed() -> None:
    plan = open_loop(ONE, Constant(), rate=10.0, count=100, warmup=0, seed=1)
    results = in_virtual_time(lambda loop: a_run(plan, StallingServer(loop.time), loop).open_loop())
    during = [one for one in results if STALL_BEGINS <= one.scheduled_s < STALL_ENDS]
    assert len(during) == 50
    for one in during:
        assert one.ttft_s is not None
        assert one.ttft_s >= STALL_ENDS - one.scheduled_s
        assert one.lag_s == pytest.approx(0.0), "the server stalled, not the client"


def test_a_closed_loop_sees_it_once() -> None:
    """Which is why a closed loop measures capacity, and never latency under load."""
    plan = closed_loop(ONE, count=100, warmup=0, seed=1)
    results = in_virtual_time(lambda loop: a_run(plan, StallingServer(loop.time), loop).closed_loop(1))
    assert sum((one.ttft_s or 0.0) > 2 * SERVICE_S for one in results) == 1


def test_a_client_that_is_late_says_so_and_counts_it() -> None:
    plan = open_loop(ONE, Constant(), rate=10.0, count=30, warmup=0, seed=1)
    results = in_virtual_time(lambda loop: a_run(plan, BlockingClient(loop), loop).open_loop())
    late = [one for one in results if 0.2 < one.scheduled_s < 2.2 - 1e-6]
    assert len(late) == 19
    for one in late:
        assert one.sent_s == pytest.approx(2.2)
        assert one.lag_s == pytest.approx(2.2 - one.scheduled_s)
        assert one.ttft_s == pytest.approx(one.lag_s)
    assert results[-1].lag_s == pytest.approx(0.0)


def test_what_has_not_ended_in_time_is_a_miss() -> None:
    plan = open_loop(ONE, Constant(), rate=10.0, count=20, warmup=0, seed=1)
    results = in_virtual_time(lambda loop: a_run(plan, StallingServer(loop.time), loop, timeout_s=1.0).open_loop())
    missed = [one for one in results if one.error is not None]
    assert len(results) == 20
    assert {one.error for one in missed} == {"not ended in time"}
    assert all(one.ended_s == pytest.approx(2.9) for one in missed)
    assert len(missed) == 20 - len([one for one in plan if (one.at_s or 0.0) + SERVICE_S < STALL_BEGINS + 1e-6])
