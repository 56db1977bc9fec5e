"""Who gives up its blocks when the pool is full."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A running sequence. `arrived` orders by age; `protected`: a peer has been offered its blocks."""

    handle: int
    arrived: int
    protected: bool = False


def choose_victim(candidates: Sequence[Candidate]) -> int | None:
    """The handle of the sequence to preempt, or None.

    The oldest is never a victim, so the pool always drains. Of the others the youngest goes: it has the least to compute
    again and has waited least.
    """
    oldest = min(candidates, key=lambda candidate: candidate.arrived, default=None)
    others = [candidate for candidate in candidates if candidate is not oldest and not candidate.protected]
    return max(others, key=lambda candidate: candidate.arrived).handle if others else None
