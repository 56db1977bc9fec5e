"""Choosing from candidates in descending order: top-k, top-p, min-p, then the inverse of the cumulative distribution.

Given the best few hundred tokens of a vocabulary, `choose` says which one is drawn, or that these candidates do not suffice;
then it is asked again with all tokens, sorted. Both answers come from this one function, over the same order (value descending,
then id ascending) and over integer masses, so the short way never draws another token than the long one. native/draw.h finds the
same token without sorting.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.engine.draw_row import least_scaled

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """`top_k` is None for all; `top_p` 1.0 and `min_p` 0.0 keep all. Applied in that order: top-p counts what top-k left."""

    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def needs_total(self) -> bool:
        """Whether the mass of the whole vocabulary enters the choice."""
        return self.top_k is None


def choose(scaled: Floats, masses: Integers, truncation: Truncation, *, uniform: float, total: int, complete: bool) -> int | None:
    """The index of the drawn candidate, or None where these candidates cannot tell.

    `scaled` is (logit - best logit) / temperature, descending, and `masses` are those of token_mass.py; `complete` says that
    they cover the vocabulary; `total` is the mass of the whole vocabulary (read only where `needs_total`); `uniform` is in [0, 1).
    """
    mass = np.cumsum(masses)
    kept = _kept(scaled, mass, truncation, total=total, complete=complete)
    if kept is None:
        return None
    truncated = complete or kept < len(scaled)
    index = int(np.searchsorted(mass[:kept], _place_in(int(mass[kept - 1]) if truncated else total, uniform), side="right"))
    if index >= kept:
        return None
    edge = kept - 1 if truncated else index
    if not complete and scaled[edge] == scaled[-1]:
        return None  # a token outside may have this very value and a lower id
    return index


def _kept(scaled: Floats, mass: Integers, truncation: Truncation, *, total: int, complete: bool) -> int | None:
    """How many candidates from the first on are left after truncation; all of them may mean that nothing was cut."""
    count = len(scaled)
    if truncation.top_k is not None:
        if truncation.top_k >= count and not complete:
            return None
        count = min(count, truncation.top_k)
        total = int(mass[count - 1])
    cut = count
    if truncation.top_p < 1.0:
        cut = min(cut, 1 + int(np.searchsorted(mass[:count], _part_of(total, truncation.top_p), side="left")))
    if truncation.min_p > 0.0:
        cut = min(cut, int(np.searchsorted(-scaled[:count], -least_scaled(truncation.min_p), side="right")))
    narrows = truncation.top_p < 1.0 or truncation.min_p > 0.0
    if narrows and cut == len(scaled) and not complete:
        return None
    return max(cut, 1)


def _part_of(mass: int, part: float) -> int:
    return min(mass, max(1, math.ceil(part * float(mass))))


def _place_in(mass: int, number: float) -> int:
    return min(mass - 1, int(number * float(mass)))
