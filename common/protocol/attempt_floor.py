"""The lowest attempt that is still welcome, per (request, choice): the tombstone that fences what was replaced or cancelled.

A cancel sets it to attempt + 1, a higher attempt to its own; below it everything is refused as stale. Kept for sequences
never seen too, since a cancel may overtake the dispatch that it is about.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from common.values.ids import RequestId, SequenceKey

KEEP_S = 120.0
MAX_REQUESTS = 65536


@dataclass(slots=True)
class _Floors:
    touched: float
    every_choice: int = 0
    choices: dict[int, int] = field(default_factory=dict)


class AttemptFloors:
    """One per worker. Entries go 120 s after they were last touched; the oldest go first past a fixed bound."""

    def __init__(self) -> None:
        self._requests: OrderedDict[RequestId, _Floors] = OrderedDict()

    def __len__(self) -> int:
        return len(self._requests)

    def floor(self, key: SequenceKey) -> int:
        entry = self._requests.get(key.request_id)
        return 0 if entry is None else max(entry.every_choice, entry.choices.get(key.choice, 0))

    def is_stale(self, key: SequenceKey, attempt: int) -> bool:
        return attempt < self.floor(key)

    def admit(self, key: SequenceKey, attempt: int, now: float) -> bool:
        """Whether this attempt may run here; from now on lower ones may not."""
        if self.is_stale(key, attempt):
            return False
        entry = self._touch(key.request_id, now)
        entry.choices[key.choice] = max(attempt, entry.choices.get(key.choice, 0))
        return True

    def cancel(self, request: RequestId, attempt: int, choices: Iterable[int] | None, now: float) -> None:
        entry = self._touch(request, now)
        if choices is None:
            entry.every_choice = max(entry.every_choice, attempt + 1)
            return
        for choice in choices:
            entry.choices[choice] = max(attempt + 1, entry.choices.get(choice, 0))

    def expire(self, now: float) -> None:
        while self._requests:
            request, entry = next(iter(self._requests.items()))
            if entry.touched + KEEP_S > now and len(self._requests) <= MAX_REQUESTS:
                return
            del self._requests[request]

    def _touch(self, request: RequestId, now: float) -> _Floors:
        entry = self._requests.setdefault(request, _Floors(touched=now))
        entry.touched = now
        self._requests.move_to_end(request)
        return entry
