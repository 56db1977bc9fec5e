"""What all parts of one simulated mesh share: time, chance, the strength of faults, and the record of what happened."""

from collections import Counter
from dataclasses import dataclass, field
from random import Random

from common.simulation.fault_strength import FaultStrength, without_faults
from common.simulation.schedule import START_S, Schedule


@dataclass(slots=True, kw_only=True)
class Surroundings:
    """`counts` lets tests see what the schedules reach; `trace` (None: not wanted) tells a world line by line."""

    random: Random
    strength: FaultStrength
    schedule: Schedule = field(default_factory=Schedule)
    counts: Counter[str] = field(default_factory=Counter)
    trace: list[str] | None = None

    @property
    def now(self) -> float:
        return self.schedule.now

    def note(self, who: str, what: object) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.schedule.now - START_S:9.4f}  {who:<8} {what}")

    def takes(self, typical_s: float) -> float:
        """Around the typical time, now and then much longer."""
        random = self.random.random()
        return typical_s * (0.5 + random + (10.0 * (random - 0.95) * 20.0 if random > 0.95 else 0.0))

    def calm_down(self) -> None:
        """No more faults from now on; speeds stay."""
        self.strength = without_faults(self.strength)
