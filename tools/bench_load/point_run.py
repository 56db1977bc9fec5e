"""One point: sends a plan's requests by their schedule, or as others end, and gathers what became of each."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from tools.bench_load.arrivals import PlannedRequest
from tools.bench_load.http_client import Answer
from tools.bench_load.request_result import RequestResult


@dataclass(slots=True)
class Progress:
    """Of the point that runs, for whoever shows it."""

    planned: int
    sent: int = 0
    ended: int = 0
    failed: int = 0


class Client(Protocol):
    async def stream(self, request: bytes) -> Answer: ...


class PointRun:
    """`requests` are the bytes of each planned request, made before the start: the loop that sends computes nothing.

    `timeout_s` after the last scheduled request (in a closed loop: after the start) what still runs is given up.
    """

    def __init__(
        self,
        plan: Sequence[PlannedRequest],
        requests: Sequence[bytes],
        client: Client,
        clock: Callable[[], float],
        *,
        timeout_s: float,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._plan = plan
        self._requests = requests
        self._client = client
        self._clock = clock
        self._timeout_s = timeout_s
        self._on_progress = on_progress
        self._progress = Progress(len(plan))
        self._results: list[RequestResult] = []
        self._start = 0.0
        self._deadline = 0.0

    async def open_loop(self) -> list[RequestResult]:
        """Every request has an `at_s`; each is sent then, whatever has become of those before."""
        self._begin(max(planned.at_s or 0.0 for planned in self._plan))
        async with asyncio.TaskGroup() as group:
            for planned, request in zip(self._plan, self._requests, strict=True):
                due = self._start + (planned.at_s or 0.0)
                wait = due - self._clock()
                if wait > 0.0:
                    await asyncio.sleep(wait)
                group.create_task(self._send(planned, request, due))
        return self._sorted()

    async def closed_loop(self, concurrency: int) -> list[RequestResult]:
        """That many at a time; a latency counts from its own sending."""
        self._begin(0.0)
        rest = iter(zip(self._plan, self._requests, strict=True))
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(self._one_by_one(rest))
        return self._sorted()

    async def _one_by_one(self, rest: Iterator[tuple[PlannedRequest, bytes]]) -> None:
        for planned, request in rest:
            await self._send(planned, request, None)

    def _begin(self, last_at_s: float) -> None:
        self._start = self._clock()
        self._deadline = self._start + last_at_s + self._timeout_s

    async def _send(self, planned: PlannedRequest, request: bytes, due: float | None) -> None:
        sent = self._clock()
        self._progress.sent += 1
        self._on_progress(self._progress)
        answer: Answer | None = None
        try:
            async with asyncio.timeout(max(0.0, self._deadline - sent)):
                answer = await self._client.stream(request)
        except TimeoutError:
            pass
        result = self._result(planned, answer, sent if due is None else due, sent)
        self._results.append(result)
        self._progress.ended += 1
        self._progress.failed += result.error is not None
        self._on_progress(self._progress)

    def _result(self, planned: PlannedRequest, answer: Answer | None, due: float, sent: float) -> RequestResult:
        reader = None if answer is None else answer.reader
        usage = None if reader is None else reader.usage
        arrivals = () if reader is None else tuple(round(at - self._start, 6) for at in reader.arrivals)
        details = None if usage is None else usage.prompt_tokens_details
        return RequestResult(
            number=planned.number,
            kind=planned.kind,
            measured=planned.measured,
            scheduled_s=round(due - self._start, 6),
            sent_s=round(sent - self._start, 6),
            ended_s=round((self._clock() if answer is None else answer.ended) - self._start, 6),
            arrivals_s=arrivals,
            planned_prompt_tokens=planned.prompt_tokens,
            planned_output_tokens=planned.output_tokens,
            prompt_tokens=(usage.prompt_tokens if usage else 0) or planned.prompt_tokens,
            output_tokens=(usage.completion_tokens if usage else 0) or len(arrivals),
            cached_tokens=None if details is None else details.cached_tokens,
            error="not ended in time" if answer is None else answer.failure,
            request_id=None if answer is None else answer.request_id,
        )

    def _sorted(self) -> list[RequestResult]:
        return sorted(self._results, key=lambda result: result.number)
