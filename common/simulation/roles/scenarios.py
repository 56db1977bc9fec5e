"""Loads that change: from long prompts with short answers to short prompts with long answers, and how fast.

Each scenario says where the load is between the two at every moment. The rates are of the whole deployment, so that each end is
near what the best split for it can carry.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from common.simulation.goodput.flight import Arrival
from common.simulation.goodput.workloads import RequestClass


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadEnds:
    """`reading`: long prompts, short answers; `writing`: the other way. Requests a second where the load is all of that kind."""

    reading: RequestClass
    writing: RequestClass
    reading_rps: float
    writing_rps: float

    def scaled(self, factor: float) -> "LoadEnds":
        return LoadEnds(
            reading=self.reading, writing=self.writing, reading_rps=factor * self.reading_rps, writing_rps=factor * self.writing_rps
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """`place_at`: 0 is all reading, 1 all writing, by the share of the scenario's time that has passed."""

    name: str
    seconds: float
    place_at: Callable[[float], float]

    def draw(self, ends: LoadEnds, rng: Random) -> list[Arrival]:
        """Two Poisson processes with rates that change, by thinning (Lewis and Shedler, 1979)."""
        arrivals = []
        for kind, top in ((ends.reading, ends.reading_rps), (ends.writing, ends.writing_rps)):
            now = rng.expovariate(top)
            while now < self.seconds:
                place = self.place_at(now / self.seconds)
                if rng.random() < (place if kind is ends.writing else 1.0 - place):
                    prompt, output = kind.prompt.draw(rng), kind.output.draw(rng)
                    arrivals.append(Arrival(arrived_s=now, prompt_tokens=prompt, output_tokens=output, request_class=kind.name))
                now += rng.expovariate(top)
        return sorted(arrivals, key=lambda arrival: arrival.arrived_s)


def scenarios(seconds: float) -> tuple[Scenario, ...]:
    def burst(passed: float) -> float:
        return 0.15 if 0.25 <= passed < 0.4 or 0.65 <= passed < 0.8 else 0.8

    return (
        Scenario(name="steady", seconds=seconds, place_at=lambda _: 0.5),
        Scenario(name="shift", seconds=seconds, place_at=lambda passed: 0.1 if passed < 0.4 else 0.9),
        Scenario(name="ramp", seconds=seconds, place_at=lambda passed: 0.1 + 0.8 * passed),
        Scenario(name="burst", seconds=seconds, place_at=burst),
        Scenario(name="sine", seconds=seconds, place_at=lambda passed: 0.5 - 0.4 * math.cos(4.0 * math.pi * passed)),
    )
