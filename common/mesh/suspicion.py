"""Whether a request takes workers down, as its gateway sees it.

The loss of a worker makes a suspect of everything that ran there; nobody is charged for it. Workers run suspects one at a
time and announce them first, so a second loss has one culprit at most: the suspect that the lost worker had announced. It
is poison, and not placed a third time. A new token is the proof of innocence.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from common.values.ids import WorkerId


@dataclass(slots=True)
class Suspicion:
    """One per request: its choices that are suspects, and those that a worker has announced and that made no token since.

    Workers may announce what a lost peer of theirs had; only a request that has lost a worker before (`losses`) is to blame
    for a second one.
    """

    choices: set[int] = field(default_factory=set)
    announced: dict[WorkerId, set[int]] = field(default_factory=dict)
    losses: int = 0

    def announce(self, worker: WorkerId, choice: int) -> None:
        self.announced.setdefault(worker, set()).add(choice)

    def clear(self, worker: WorkerId, choice: int) -> None:
        """It runs there no more; whether it is innocent is not known."""
        self.announced.get(worker, set()).discard(choice)

    def token_came(self, worker: WorkerId, choice: int) -> None:
        self.choices.discard(choice)
        self.clear(worker, choice)

    def is_announced_at(self, worker: WorkerId) -> bool:
        return bool(self.announced.get(worker))

    def worker_lost(self, worker: WorkerId, unfinished: Iterable[int]) -> bool:
        """Whether the request is to blame for it."""
        self.choices.update(unfinished)
        self.losses += 1
        return self.losses > 1 and self.is_announced_at(worker)

    def placed_again(self) -> None:
        """What was announced was of the attempt before."""
        self.announced.clear()
