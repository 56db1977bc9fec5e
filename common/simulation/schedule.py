"""Virtual time: actions run in the order of their times, those of one moment in the order in which they were planned."""

import heapq
from collections.abc import Callable

Action = Callable[[], None]
START_S = 100.0


class Schedule:
    """`now` moves only when an action runs. `ran` counts actions: faults are planned by it, so that they hit busy moments."""

    def __init__(self) -> None:
        self.now = START_S
        self.ran = 0
        self._planned: list[tuple[float, int, Action]] = []
        self._number = 0

    def at(self, when: float, action: Action) -> None:
        """A time that has passed means now."""
        self._number += 1
        heapq.heappush(self._planned, (max(when, self.now), self._number, action))

    def after(self, seconds: float, action: Action) -> None:
        self.at(self.now + seconds, action)

    def run_next(self) -> bool:
        """Run one action; False where nothing is planned."""
        if not self._planned:
            return False
        self.now, _, action = heapq.heappop(self._planned)
        self.ran += 1
        action()
        return True
