"""One simulation of one candidate at one rate: how many requests were good, and what the others missed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from common.simulation.goodput.deployment import Deployment
from common.simulation.goodput.flight import Arrival, Flight
from common.simulation.goodput.goodput_simulator import GoodputSimulator
from common.values.objectives import Objectives


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """`late` missed TTFT, `slow` missed TPOT; a request may have missed both. `least_class`: attainment of the class that has least
    of it. `good_tokens`: output tokens of good requests."""

    rate: float
    requests: int
    good: int
    late: int
    slow: int
    good_tokens: int
    least_class: float

    @property
    def attained(self) -> float:
        return self.good / self.requests

    @property
    def good_tokens_per_s(self) -> float:
        return self.good_tokens * self.rate / self.requests


def try_out(
    deployment: Deployment, arrivals: Sequence[Arrival], objectives: Mapping[str, Objectives], *, rate: float, seed: int
) -> Trial:
    flights = GoodputSimulator(deployment, objectives, Random(seed)).run(arrivals)
    late = slow = good_tokens = 0
    good_of: Counter[str] = Counter()
    count_of: Counter[str] = Counter()
    for flight in flights:
        is_late, is_slow = _misses(flight, first_token_counts=deployment.first_token_counts)
        late += is_late
        slow += is_slow
        count_of[flight.arrival.request_class] += 1
        if not (is_late or is_slow):
            good_of[flight.arrival.request_class] += 1
            good_tokens += flight.arrival.output_tokens
    return Trial(
        rate=rate,
        requests=len(flights),
        good=good_of.total(),
        late=late,
        slow=slow,
        good_tokens=good_tokens,
        least_class=min(good_of[name] / count for name, count in count_of.items()),
    )


def _misses(flight: Flight, *, first_token_counts: bool) -> tuple[bool, bool]:
    """A refused request is late."""
    speed = flight.speed(first_token_counts=first_token_counts)
    if speed is None:
        return True, False
    return speed.ttft_s > flight.objectives.ttft_for(flight.unloaded_s), speed.tpot_s > flight.objectives.tpot_s
