"""The state store as a gateway's shell uses it for request records: asked with a delay, and away now and then."""

from collections.abc import Callable
from functools import partial

from common.simulation.simulated_process import SimulatedProcess
from common.simulation.surroundings import Surroundings

TIMEOUT_S = 1.0


class SimulatedStore:
    """`attempts` holds the highest attempt that each record shows."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self.away_until = 0.0
        self.attempts: dict[str, int] = {}

    def cut(self, seconds: float) -> None:
        self._around.note("store", f"is away for {seconds:.2f} s")
        self.away_until = self._around.now + seconds

    def record(self, process: SimulatedProcess, key: str, attempt: int, done: Callable[[bool], None]) -> None:
        """`done` is told whether the record was written."""
        if self._around.now < self.away_until:
            process.after(self._around.random.choice([0.001, TIMEOUT_S]), "store", partial(done, False))
            return
        self.attempts[key] = max(attempt, self.attempts.get(key, 0))
        process.after(self._around.takes(self._around.strength.message_delay_s), "store", partial(done, True))
