"""Which prompts a worker computes next.

`feasible_first` serves the objective of goodput: as many prompts on time as can be. `fcfs`, `shortest_first` and `edf` are the
baselines that it is compared with.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, assert_never

from common.policy.feasible_first import FeasibleFirst
from common.policy.queued_prompt import QueuedPrompt
from common.policy.step_time import PrefillTime
from common.values.errors import InvariantBroken

PrefillOrder = Literal["feasible_first", "edf", "shortest_first", "fcfs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """`max_tokens` (the saturation length is a good one) bounds a batch of several; one prompt alone may be longer."""

    max_tokens: int
    max_prompts: int = 1 << 30

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.max_prompts < 1:
            raise ValueError("batch limits are at least 1")


class PrefillQueue:
    """Handles are unique among what is waiting."""

    def __init__(self, order: PrefillOrder, time: PrefillTime, limits: BatchLimits) -> None:
        self._time = time
        self._limits = limits
        self._line = _line_of(order)
        self._guards_deadlines = order == "feasible_first"
        self._waiting: dict[int, QueuedPrompt] = {}
        self.tokens = 0
        self.work_s = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def retime(self, time: PrefillTime, limits: BatchLimits) -> None:
        """What has been learnt of the worker's speed; prompts that wait keep the work that they were queued with."""
        self._time, self._limits = time, limits

    def push(self, prompt: QueuedPrompt) -> None:
        if prompt.handle in self._waiting:
            raise InvariantBroken(f"prompt {prompt.handle} is queued twice")
        self._waiting[prompt.handle] = prompt
        self.tokens += prompt.tokens
        self.work_s += prompt.work_s
        self._line.push(prompt)

    def remove(self, handle: int) -> QueuedPrompt | None:
        """A prompt that was cancelled or handed to another worker; None where it is not waiting."""
        prompt = self._waiting.pop(handle, None)
        if prompt is not None:
            self._forget(prompt)
            self._line.remove(prompt)
        return prompt

    def ahead_s(self, prompt: QueuedPrompt, now: float) -> float:
        """Work that would be done before a prompt that is not queued yet, if nothing else came."""
        return self._line.ahead_s(prompt, now, self.work_s)

    def peek(self, now: float) -> QueuedPrompt | None:
        """The first of the next batch."""
        first = next(self._line.in_order(now), None)
        self._line.took([])
        return first

    def next_batch(self, now: float, *, alone: bool = False) -> list[QueuedPrompt]:
        """Take the prompts of the next step out of the queue: none only where none waits, one where it is to be `alone`.

        The first one always; then others in order, while all fit the limits and (feasible first; the baselines do not look) no
        prompt that would have been on time becomes late because the step grew.
        """
        batch: list[QueuedPrompt] = []
        tokens, end, latest = 0, now + self._time.base_s, float("inf")
        for prompt in self._line.in_order(now):
            longer = end + prompt.work_s - self._time.base_s
            if batch and (tokens + prompt.tokens > self._limits.max_tokens or longer > latest):
                break
            batch.append(prompt)
            tokens += prompt.tokens
            end = longer
            if self._guards_deadlines and end <= prompt.deadline:
                latest = min(latest, prompt.deadline)
            if alone or len(batch) == self._limits.max_prompts or tokens >= self._limits.max_tokens:
                break
        for prompt in batch:
            del self._waiting[prompt.handle]
            self._forget(prompt)
        self._line.took(batch)
        return batch

    def waiting(self) -> Iterator[QueuedPrompt]:
        return iter(self._waiting.values())

    def _forget(self, prompt: QueuedPrompt) -> None:
        self.tokens -= prompt.tokens
        self.work_s = self.work_s - prompt.work_s if self._waiting else 0.0


class _Line(Protocol):
    def push(self, prompt: QueuedPrompt) -> None: ...

    def remove(self, prompt: QueuedPrompt) -> None: ...

    def in_order(self, now: float) -> Iterator[QueuedPrompt]:
        """From the first on. What is taken is told to `took` at once, a beginning of this order."""
        ...

    def took(self, batch: list[QueuedPrompt]) -> None: ...

    def ahead_s(self, prompt: QueuedPrompt, now: float, all_s: float) -> float: ...


def _line_of(order: PrefillOrder) -> _Line:
    match order:
        case "feasible_first":
            return FeasibleFirst()
        case "edf" | "shortest_first" | "fcfs":
            return _Ranked(order)
        case _:
            assert_never(order)


class _Ranked:
    """A heap by a rank that does not change with time."""

    def __init__(self, order: Literal["edf", "shortest_first", "fcfs"]) -> None:
        self._order = order
        self._heap: list[tuple[float, float, int, QueuedPrompt]] = []
        self._popped: list[tuple[float, float, int, QueuedPrompt]] = []

    def push(self, prompt: QueuedPrompt) -> None:
        heapq.heappush(self._heap, (self._rank(prompt), prompt.arrived_at, prompt.handle, prompt))

    def remove(self, prompt: QueuedPrompt) -> None:
        self._heap = [entry for entry in self._heap if entry[3] is not prompt]
        heapq.heapify(self._heap)

    def in_order(self, now: float) -> Iterator[QueuedPrompt]:
        self._popped = []
        while self._heap:
            entry = heapq.heappop(self._heap)
            self._popped.append(entry)
            yield entry[3]

    def took(self, batch: list[QueuedPrompt]) -> None:
        for entry in self._popped[len(batch) :]:
            heapq.heappush(self._heap, entry)
        self._popped = []

    def ahead_s(self, prompt: QueuedPrompt, now: float, all_s: float) -> float:
        if self._order == "fcfs":
            return all_s
        rank = self._rank(prompt)
        return sum(entry[3].work_s for entry in self._heap if entry[0] <= rank)

    def _rank(self, prompt: QueuedPrompt) -> float:
        match self._order:
            case "edf":
                return prompt.deadline
            case "shortest_first":
                return float(prompt.tokens)
            case "fcfs":
                return prompt.arrived_at
