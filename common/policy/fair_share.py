"""Who has had more than their share: keys of one request class share it by tokens served.

What a key was served lately (it fades with time) is put beside the mean of the other keys'. A request of a key that is well
above them gives way to theirs; it is served all the same where there is room, for a share is of what is wanted and not of what is
there. Virtual counters (Sheng et al., OSDI 2024) are fair among keys that always wait, but a key that wants little is
lifted to the greedy one's counter each time it comes: hence a rate.
"""

import math
from dataclasses import dataclass

OUTPUT_WEIGHT = 4.0
"""Of an output token against a prompt token."""
FADES_S = 30.0
ABOVE = 2.0
"""Times the mean of the others that a key may have."""
FORGOTTEN = 1.0
"""Weighted tokens below which a key counts as away."""


@dataclass(slots=True)
class Fading:
    """A sum whose parts fade with time."""

    total: float
    at: float

    def add(self, amount: float, now: float) -> None:
        self.total = self.at_time(now) + amount
        self.at = max(self.at, now)

    def at_time(self, now: float) -> float:
        return self.total * math.exp(min(0.0, self.at - now) / FADES_S)


class FairShare:
    """`allowance`: weighted tokens that a key may have in any case. Keys that have been away are forgotten, so what is kept
    is bounded by who came in the last minutes."""

    def __init__(self, allowance: float) -> None:
        if allowance <= 0.0:
            raise ValueError("an allowance is positive")
        self._allowance = allowance
        self._served: dict[str, Fading] = {}
        self._all = Fading(0.0, 0.0)
        self._swept_at = 0.0

    def __len__(self) -> int:
        return len(self._served)

    def begin(self, key: str, prompt_tokens: int, now: float) -> bool:
        """A request of the key has come; True: it gives way to those of others. Its prompt counts at once, so that a burst is
        seen while it is queued."""
        self._sweep(now)
        had = self._served[key].at_time(now) if key in self._served else 0.0
        others = len(self._served) - (key in self._served)
        mean = (self._all.at_time(now) - had) / others if others else math.inf
        self._add(key, float(prompt_tokens), now)
        return had > self._allowance + ABOVE * mean

    def end(self, key: str, output_tokens: int, now: float) -> None:
        """A request of the key is over, with that many tokens made."""
        self._add(key, OUTPUT_WEIGHT * output_tokens, now)

    def _add(self, key: str, tokens: float, now: float) -> None:
        self._all.add(tokens, now)
        if key in self._served:
            self._served[key].add(tokens, now)
        else:
            self._served[key] = Fading(tokens, now)

    def _sweep(self, now: float) -> None:
        """Now and then: who is away counts for nothing, and would only lower the mean."""
        if now - self._swept_at < 0.25 * FADES_S:
            return
        self._swept_at = now
        self._served = {key: served for key, served in self._served.items() if served.at_time(now) >= FORGOTTEN}
        self._all = Fading(sum(served.at_time(now) for served in self._served.values()), now)
