"""Schedules: which request is sent when, fixed before the first one leaves.

An open loop sends by its schedule whatever the server does, and latencies count from it: a server that stalls cannot thin out
its own load ("coordinated omission"). Times are seconds from the start of a point; warm-up requests come before the measured.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from common.simulation.goodput.flight import Arrival
from tools.bench_load.bench_refused import BenchRefused
from tools.bench_load.request_class import RequestClass


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """`at_s` is None in a closed loop: it is sent when another one has ended."""

    number: int
    at_s: float | None
    kind: str
    prompt_tokens: int
    output_tokens: int
    measured: bool


@dataclass(frozen=True, slots=True)
class Poisson:
    def __str__(self) -> str:
        return "poisson"


@dataclass(frozen=True, slots=True)
class Gamma:
    """Gaps of a coefficient of variation: 1 is Poisson, more is burstier."""

    variation: float

    def __post_init__(self) -> None:
        if not self.variation > 0.0:
            raise BenchRefused("gamma's coefficient of variation is positive")

    def __str__(self) -> str:
        return f"gamma:{self.variation:g}"


@dataclass(frozen=True, slots=True)
class Constant:
    def __str__(self) -> str:
        return "constant"


Arrivals = Poisson | Gamma | Constant


def parse_arrivals(text: str) -> Arrivals:
    name, _, value = text.partition(":")
    match name:
        case "poisson":
            return Poisson()
        case "constant":
            return Constant()
        case "gamma" if value:
            try:
                return Gamma(float(value))
            except ValueError:
                pass
    raise BenchRefused(f"arrivals {text!r}: poisson, constant, or gamma:VARIATION")


def open_loop(
    classes: Sequence[RequestClass], arrivals: Arrivals, *, rate: float, count: int, warmup: int, seed: int
) -> tuple[PlannedRequest, ...]:
    """`count` measured requests at `rate` a second, behind `warmup` others of the same kind.

    The measured part is a function of seed, rate, count and classes alone, whatever the warm-up.
    """
    if not rate > 0.0 or count < 1:
        raise BenchRefused("rate and number of requests are positive")
    before = _draw(classes, arrivals, rate, warmup, random.Random(f"warm-up {seed}"))
    rng = random.Random(seed)
    measured = _draw(classes, arrivals, rate, count, rng)
    start = before[-1][0] + rng_gap(arrivals, rate, random.Random(f"between {seed}")) if before else 0.0
    planned = [(at, kind, False) for at, kind in before] + [(start + at, kind, True) for at, kind in measured]
    return tuple(
        PlannedRequest(
            number=number,
            at_s=at,
            kind=kind.name,
            prompt_tokens=kind.prompt_tokens,
            output_tokens=kind.output_tokens,
            measured=is_measured,
        )
        for number, (at, kind, is_measured) in enumerate(planned)
    )


def closed_loop(classes: Sequence[RequestClass], *, count: int, warmup: int, seed: int) -> tuple[PlannedRequest, ...]:
    """In the order in which they are taken."""
    rng = random.Random(seed)
    kinds = rng.choices(classes, [one.share for one in classes], k=count + warmup)
    return tuple(
        PlannedRequest(
            number=number,
            at_s=None,
            kind=kind.name,
            prompt_tokens=kind.prompt_tokens,
            output_tokens=kind.output_tokens,
            measured=number >= warmup,
        )
        for number, kind in enumerate(kinds)
    )


def replay(trace: Sequence[Arrival], *, kind: str, warmup: int) -> tuple[PlannedRequest, ...]:
    """A trace as it stands; its first `warmup` requests are not measured."""
    return tuple(
        PlannedRequest(
            number=number,
            at_s=arrival.arrived_s,
            kind=kind,
            prompt_tokens=arrival.prompt_tokens,
            output_tokens=arrival.output_tokens,
            measured=number >= warmup,
        )
        for number, arrival in enumerate(trace)
    )


def real_rate(planned: Sequence[PlannedRequest]) -> float | None:
    """Measured requests a second as they were drawn, which for few requests is not the rate that was asked for."""
    times = [one.at_s for one in planned if one.measured and one.at_s is not None]
    span = times[-1] - times[0] if times else 0.0
    return (len(times) - 1) / span if span > 0.0 else None


def rng_gap(arrivals: Arrivals, rate: float, rng: random.Random) -> float:
    """Seconds between two requests."""
    match arrivals:
        case Poisson():
            return rng.expovariate(rate)
        case Gamma(variation=variation):
            shape = 1.0 / variation**2
            return rng.gammavariate(shape, 1.0 / (shape * rate))
        case Constant():
            return 1.0 / rate


def _draw(
    classes: Sequence[RequestClass], arrivals: Arrivals, rate: float, count: int, rng: random.Random
) -> list[tuple[float, RequestClass]]:
    """The classes first, then the gaps: so the rate changes the times and not what is sent."""
    kinds = rng.choices(classes, [one.share for one in classes], k=count)
    at, drawn = 0.0, []
    for kind in kinds:
        drawn.append((at, kind))
        at += rng_gap(arrivals, rate, rng)
    return drawn
