"""The order of goodput: as many prompts on time as can be, none starved, none dropped.

Earliest deadline first among a set that can all be on time (Moore and Hodgson: where the set is too much, its longest prompt waits),
then those that could still make it alone, and those that are too late already last, in the order of arrival. Prompts of keys
that have had more than their share come after those of others. The late ones keep a share of the worker's time.
"""

import heapq
from bisect import insort
from collections.abc import Iterator

from common.policy.queued_prompt import QueuedPrompt

LATE_SHARE = 0.1
"""Of the worker's time, while prompts that can be on time are waiting too."""
MAX_PLANNED = 128
"""Of the prompts that can be on time, that many are planned at once: a decision stays short in a long queue."""


class FeasibleFirst:
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
        planned = [entry[2] for entry in self._hopeful[:MAX_PLANNED]]
        yield from _most_on_time([prompt for prompt in planned if not prompt.gives_way], now)
        yield from _most_on_time([prompt for prompt in planned if prompt.gives_way], now)
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
        """Late ones are overtaken, but for their share, and those that give way by those that do not. Looks no further than to
        where it would be late itself: it is asked for every request and worker."""
        longest_s = prompt.deadline - now - prompt.work_s
        before_s = 0.0
        for deadline, _, other in self._hopeful:
            if deadline > prompt.deadline and not prompt.gives_way:
                break
            if other.gives_way and (deadline > prompt.deadline or not prompt.gives_way):
                continue
            before_s += other.work_s
            if before_s > longest_s:
                return all_s
        if longest_s < 0.0:
            return all_s
        late_s = 0.0
        for _, _, other in self._late:
            late_s += other.work_s
            if late_s >= LATE_SHARE * before_s:
                break
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
