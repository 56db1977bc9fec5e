"""Bringing a trace down to a small deployment, and saying what that changes.

A trace cannot be made smaller without becoming another one, so each way says what it keeps and what it loses. Thinning is the first
choice: it keeps lengths and the shape of the day.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from common.simulation.goodput.flight import Arrival
from common.simulation.goodput.workloads import total_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescaled:
    arrivals: list[Arrival]
    note: str


def thinned(arrivals: Sequence[Arrival], share: float, rng: Random) -> Rescaled:
    """Each request stays with that probability."""
    if not 0.0 < share <= 1.0:
        raise ValueError("a share is above zero and at most one")
    kept = [arrival for arrival in arrivals if share == 1.0 or rng.random() < share]
    note = (
        f"thinned to {len(kept)} of {len(arrivals)} requests: lengths and slow swings kept, bursts smaller, prefixes less often shared"
    )
    return Rescaled(arrivals=kept, note=note)


def stretched(arrivals: Sequence[Arrival], factor: float) -> Rescaled:
    """All times that much longer: the rate falls by the factor."""
    if factor <= 0.0:
        raise ValueError("a factor is positive")
    later = [replace(arrival, arrived_s=arrival.arrived_s * factor) for arrival in arrivals]
    note = f"time stretched {factor:g} times: lengths, order and sharing kept, bursts and swings that much slower than they were"
    return Rescaled(arrivals=later, note=note)


def at_rate(arrivals: Sequence[Arrival], rate: float) -> Rescaled:
    """Time stretched so that `rate` requests come a second on the mean."""
    own = total_rate(arrivals)
    if own <= 0.0 or rate <= 0.0:
        raise ValueError("a trace of one moment has no rate" if rate > 0.0 else "a rate is positive")
    return stretched(arrivals, own / rate)


def shrunk(arrivals: Sequence[Arrival], divisor: float) -> Rescaled:
    """Lengths divided, at least one token. Names of prefixes stand for blocks that are no longer there, so they go."""
    if divisor <= 0.0:
        raise ValueError("a divisor is positive")
    if divisor == 1.0:
        return Rescaled(arrivals=list(arrivals), note="")
    smaller = [
        replace(
            arrival,
            prompt_tokens=max(1, round(arrival.prompt_tokens / divisor)),
            output_tokens=max(1, round(arrival.output_tokens / divisor)),
            prefix=(),
        )
        for arrival in arrivals
    ]
    return Rescaled(arrivals=smaller, note=f"lengths divided by {divisor:g}: shape kept, shared prefixes lost")


def fitting(arrivals: Sequence[Arrival], kv_tokens: int) -> Rescaled:
    """Only requests whose KV fits a worker (or, where that is asked for, a context)."""
    kept = [arrival for arrival in arrivals if arrival.prompt_tokens + arrival.output_tokens <= kv_tokens]
    left_out = len(arrivals) - len(kept)
    note = f"{left_out} of {len(arrivals)} requests left out: longer than {kv_tokens} tokens" if left_out else ""
    return Rescaled(arrivals=kept, note=note)
