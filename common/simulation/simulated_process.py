"""A process of the simulated mesh: it runs, is frozen (SIGSTOP) and wakes up, dies and starts again.

Whatever happens to a process comes as an action from a source (a socket, a timer, a thread). While it is frozen actions wait,
in order per source; when it wakes they run in any order between the sources, as an event loop finds them.
"""

from collections import deque
from functools import partial

from common.simulation.schedule import Action
from common.simulation.surroundings import Surroundings


class SimulatedProcess:
    """`life` counts starts: what was planned in an earlier life does not happen in a later one."""

    def __init__(self, name: str, around: Surroundings) -> None:
        self.name = name
        self.around = around
        self.up = True
        self.frozen = False
        self.life = 1
        self._waiting: dict[str, deque[Action]] = {}

    @property
    def awake(self) -> bool:
        return self.up and not self.frozen

    def after(self, seconds: float, source: str, action: Action) -> None:
        """Plan something of this process's own: a timer, a computation that ends."""
        self.around.schedule.after(seconds, partial(self._due, self.life, source, action))

    def take(self, source: str, action: Action) -> None:
        """Something reaches the process now."""
        if not self.up:
            return
        if self.frozen:
            self._waiting.setdefault(source, deque()).append(action)
        else:
            action()

    def freeze(self) -> None:
        self.around.note(self.name, "is frozen")
        self.frozen = True

    def wake(self) -> None:
        if not self.frozen:
            return
        self.around.note(self.name, "wakes up")
        self.frozen = False
        waiting, self._waiting = self._waiting, {}
        while waiting:
            source = self.around.random.choice(list(waiting))
            waiting[source].popleft()()
            if not waiting[source]:
                del waiting[source]

    def die(self) -> None:
        """All state is lost."""
        self.around.note(self.name, "dies")
        self.up = self.frozen = False
        self._waiting.clear()

    def start_again(self) -> None:
        self.life += 1
        self.up = True
        self.around.note(self.name, f"starts again, life {self.life}")

    def _due(self, life: int, source: str, action: Action) -> None:
        if life == self.life:
            self.take(source, action)
