"""Which prompts a worker computes next.

`feasible_first` serves the objective of goodput: as many prompts on time as can be. Earliest deadline first among a set that
can all be on time (Moore and Hodgson: where the set is too much, its longest prompt waits), then those that could still make it
alone, and those that are too late already last, in the order of arrival. The late ones keep a share of the worker's time, so
that none is starved, and none is dropped. `fcfs`, `shortest_first` and `edf` are the baselines that it is compared with.
"""

import heapq
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, assert_never

from common.policy.step_time import PrefillTime
from common.values.errors import InvariantBroken

PrefillOrder = Literal["feasible_first", "edf", "shortest_first", "fcfs"]
LATE_SHARE = 0.1
"""Of the worker's time, while prompts that can be on time are waiting too."""
MAX_PLANNED = 128
"""Of the prompts that can be on time, that many are planned at once: a decision stays short in a long queue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedPrompt:
    """`tokens` are still to compute after `past`; `work_s`: their predicted time in a step of their own. The deadline is
    arrival plus a TTFT objective (length-aware where the objective is), less what follows the prefill."""

    handle: int
    tokens: int
    arrived_at: float
    deadline: float
    work_s: float
    past: int = 0


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
            return _FeasibleFirst()
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


class _FeasibleFirst:
    """`_debt_s`: worker time that the late ones are owed, a share of what went to others while they waited."""

    def __init__(self) -> None:
        self._hopeful: list[tuple[float, int, QueuedPrompt]] = []
        self._late: list[tuple[float, int, QueuedPrompt]] = []
        self._debt_s = 0.0

    def push(self, prompt: QueuedPrompt) -> None:
        insort(self._hopeful, (prompt.deadline, prompt.handle, prompt))

    def remove(self, prompt: QueuedPrompt) -> None:
        self._hopeful = [entry for entry in self._hopeful if entry[2] is not prompt]
        self._late = [entry for entry in self._late if entry[2] is not prompt]

    def in_order(self, now: float) -> Iterator[QueuedPrompt]:
        self._set_late_apart(now)
        late_first = bool(self._late) and self._debt_s >= self._late[0][2].work_s
        if late_first:
            yield self._late[0][2]
        yield from _most_on_time([entry[2] for entry in self._hopeful[:MAX_PLANNED]], now)
        for _, _, prompt in self._hopeful[MAX_PLANNED:]:
            yield prompt
        for index, (_, _, prompt) in enumerate(self._late):
            if index or not late_first:
                yield prompt

    def took(self, batch: list[QueuedPrompt]) -> None:
        if not batch:
            return
        taken = {prompt.handle for prompt in batch}
        late_s = sum(late.work_s for _, handle, late in self._late if handle in taken)
        self._hopeful = [entry for entry in self._hopeful if entry[1] not in taken]
        self._late = [entry for entry in self._late if entry[1] not in taken]
        others_s = sum(prompt.work_s for prompt in batch) - late_s
        self._debt_s = max(0.0, self._debt_s + LATE_SHARE * others_s - late_s) if self._late else 0.0

    def ahead_s(self, prompt: QueuedPrompt, now: float, all_s: float) -> float:
        """Late ones are overtaken, but for their share."""
        before_s = sum(entry[2].work_s for entry in self._hopeful if entry[0] <= prompt.deadline)
        if now + before_s + prompt.work_s > prompt.deadline:
            return all_s
        late_s = all_s - sum(entry[2].work_s for entry in self._hopeful)
        return before_s + min(late_s, LATE_SHARE * before_s)

    def _set_late_apart(self, now: float) -> None:
        """Time only runs on: who is too late stays too late."""
        late = [entry[2] for entry in self._hopeful if now + entry[2].work_s > entry[0]]
        if late:
            self._hopeful = [entry for entry in self._hopeful if now + entry[2].work_s <= entry[0]]
            for prompt in late:
                insort(self._late, (prompt.arrived_at, prompt.handle, prompt))


def _most_on_time(prompts: list[QueuedPrompt], now: float) -> list[QueuedPrompt]:
    """Prompts by deadline in; first as many as can be on time one after the other, then the rest."""
    if len(prompts) < 2:
        return prompts
    kept: list[tuple[float, int]] = []
    deferred: set[int] = set()
    end = now
    for prompt in prompts:
        heapq.heappush(kept, (-prompt.work_s, prompt.handle))
        end += prompt.work_s
        if end > prompt.deadline:
            longest, handle = heapq.heappop(kept)
            end += longest
            deferred.add(handle)
    if not deferred:
        return prompts
    return [p for p in prompts if p.handle not in deferred] + [p for p in prompts if p.handle in deferred]
