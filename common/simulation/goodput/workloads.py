"""Requests that are drawn: arrivals by a Poisson or a Gamma process, lengths by class."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from common.simulation.goodput.flight import Arrival
from common.values.objectives import Objectives


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Lognormal with that mean before it is cut to `least` and `most`; `sigma` zero: always the mean."""

    mean: float
    sigma: float = 0.0
    least: int = 1
    most: int = 1 << 20

    def __post_init__(self) -> None:
        if self.mean <= 0.0 or self.sigma < 0.0 or not 1 <= self.least <= self.most:
            raise ValueError("lengths have a positive mean and bounds in order")

    def draw(self, rng: Random) -> int:
        length = self.mean
        if self.sigma:
            length = rng.lognormvariate(math.log(self.mean) - 0.5 * self.sigma**2, self.sigma)
        return min(self.most, max(self.least, round(length)))


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestClass:
    """`share` of the requests, relative to the other classes'."""

    name: str
    prompt: Lengths
    output: Lengths
    objectives: Objectives
    share: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`variation` is the coefficient of variation of the time between arrivals: 1 is Poisson, more is burstier (Gamma)."""

    classes: tuple[RequestClass, ...]
    variation: float = 1.0

    def __post_init__(self) -> None:
        if not self.classes or min(each.share for each in self.classes) <= 0.0 or self.variation < 0.0:
            raise ValueError("a workload has classes with positive shares")

    @property
    def objectives(self) -> dict[str, Objectives]:
        return {each.name: each.objectives for each in self.classes}

    def draw(self, requests: int, rate: float, rng: Random) -> list[Arrival]:
        """The same seed gives the same requests at every rate, only nearer together: rates are compared on equal terms."""
        if rate <= 0.0:
            raise ValueError("a rate is positive")
        shares = [each.share for each in self.classes]
        arrivals = []
        at = 0.0
        for _ in range(requests):
            (drawn,) = rng.choices(self.classes, shares)
            arrivals.append(
                Arrival(
                    arrived_s=at / rate,
                    prompt_tokens=drawn.prompt.draw(rng),
                    output_tokens=drawn.output.draw(rng),
                    request_class=drawn.name,
                )
            )
            at += self._pause(rng)
        return arrivals

    def _pause(self, rng: Random) -> float:
        """Of mean one."""
        if self.variation == 0.0:
            return 1.0
        if self.variation == 1.0:
            return rng.expovariate(1.0)
        shape = self.variation**-2
        return rng.gammavariate(shape, 1.0 / shape)


def total_rate(arrivals: Sequence[Arrival]) -> float:
    """Requests a second, over the time from the first to the last."""
    span = arrivals[-1].arrived_s - arrivals[0].arrived_s if arrivals else 0.0
    return (len(arrivals) - 1) / span if span > 0.0 else 0.0
