"""Bringing a trace down to a small deployment, and saying what that changes.

A trace cannot be made smaller without becoming another one, so each way says what it keeps and what it loses. Thinning is the first
choice: it keeps lengths and the shape of the day.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from common.simulation.goodput.flight import Arrival


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


def fitting(arrivals: Sequence[Arrival], kv_tokens: int) -> Rescaled:
    """Only requests whose KV fits a worker."""
    kept = [arrival for arrival in arrivals if arrival.prompt_tokens + arrival.output_tokens <= kv_tokens]
    left_out = len(arrivals) - len(kept)
    note = f"{left_out} of {len(arrivals)} requests left out: longer than a worker's {kv_tokens} KV tokens" if left_out else ""
    return Rescaled(arrivals=kept, note=note)
