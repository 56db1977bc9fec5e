"""A worker that only computes prompts: batches up to the saturation length, or long prompts in chunks."""

from collections.abc import Callable

from common.policy.prefill_preemption import Interrupted, preempts
from common.policy.prefill_queue import PrefillQueue
from common.policy.queued_prompt import QueuedPrompt
from common.policy.step_time import PrefillTime
from common.simulation.goodput.deployment import Deployment
from common.simulation.goodput.flight import Flight

Planned = Callable[[float, int], None]
"""Told when the current step of a worker ends, and the version of that plan: an older one is void."""


class PrefillWorker:
    """`rest` is a long prompt that stands between two chunks, or is being computed."""

    def __init__(self, deployment: Deployment, planned: Planned) -> None:
        self._time = deployment.step_time.prefill
        self._chunk_tokens = deployment.policies.chunk_tokens
        self._queue = PrefillQueue(deployment.policies.order, self._time, deployment.batch)
        self._flights: dict[int, Flight] = {}
        self._planned = planned
        self._batch: list[QueuedPrompt] = []
        self._rest: QueuedPrompt | None = None
        self._rest_done = 0
        self._in_chunk = 0
        self._busy_until: float | None = None
        self.version = 0

    @property
    def waiting(self) -> int:
        return len(self._flights)

    def queue_s(self, flight: Flight, now: float) -> float:
        """Predicted seconds until the request's prompt would be begun, had it come now."""
        busy_s = 0.0 if self._busy_until is None else max(0.0, self._busy_until - now)
        ahead_s = self._queue.ahead_s(queued_prompt(flight, self._time), now) if len(self._queue) else 0.0
        return busy_s + ahead_s + (self._rest_s(self._in_chunk) if self._rest is not None else 0.0)

    def offer(self, flight: Flight, now: float) -> None:
        self._flights[flight.number] = flight
        self._queue.push(queued_prompt(flight, self._time))
        if self._busy_until is None:
            self._begin(now)

    def step_ended(self, now: float) -> list[Flight]:
        """The requests whose prompts are computed now. The next step has begun."""
        done = [self._flights.pop(prompt.handle) for prompt in self._batch]
        self._batch = []
        if self._in_chunk and self._rest is not None:
            self._rest_done += self._in_chunk
            self._in_chunk = 0
            if self._rest_done == self._rest.tokens:
                done.append(self._flights.pop(self._rest.handle))
                self._rest = None
        for flight in done:
            flight.first_token_s = now
        self._busy_until = None
        self._begin(now)
        return done

    def _begin(self, now: float) -> None:
        rest, chunk = self._rest, self._chunk_tokens
        if rest is not None and chunk is not None:
            urgent = self._queue.peek(now)
            running = Interrupted(rest_tokens=rest.tokens - self._rest_done, past=rest.past + self._rest_done, deadline=rest.deadline)
            if urgent is None or not preempts(running, urgent, self._time, chunk, now):
                self._run_chunk(now, rest, chunk)
                return
        batch = self._queue.next_batch(now, alone=rest is not None)
        if not batch:
            return
        for prompt in batch:
            self._flights[prompt.handle].prefill_started_s = now
        if rest is None and chunk is not None and len(batch) == 1 and batch[0].tokens > chunk:
            self._rest, self._rest_done = batch[0], 0
            self._run_chunk(now, batch[0], chunk)
            return
        self._batch = batch
        base_s = self._time.base_s
        self._run(now, base_s + sum(prompt.work_s - base_s for prompt in batch))

    def _run_chunk(self, now: float, rest: QueuedPrompt, chunk_tokens: int) -> None:
        self._in_chunk = min(chunk_tokens, rest.tokens - self._rest_done)
        self._run(now, self._time.seconds(self._in_chunk, rest.past + self._rest_done))

    def _run(self, now: float, seconds: float) -> None:
        self._busy_until = now + seconds
        self.version += 1
        self._planned(self._busy_until, self.version)

    def _rest_s(self, in_chunk: int) -> float:
        if self._rest is None or self._chunk_tokens is None:
            return 0.0
        done = self._rest_done + in_chunk
        left = self._rest.tokens - done
        return self._time.chunked_s(left, self._rest.past + done, self._chunk_tokens) if left else 0.0


def queued_prompt(flight: Flight, time: PrefillTime) -> QueuedPrompt:
    tokens = flight.arrival.prompt_tokens - flight.cached_tokens
    return QueuedPrompt(
        handle=flight.number,
        tokens=tokens,
        past=flight.cached_tokens,
        arrived_at=flight.arrival.arrived_s,
        deadline=flight.deadline,
        work_s=time.seconds(tokens, flight.cached_tokens),
        gives_way=flight.gives_way,
    )
