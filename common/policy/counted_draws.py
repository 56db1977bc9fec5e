"""Chance for code that may not have any of its own: numbers that follow from a seed and a counter (splitmix64, Steele et al.,
OOPSLA 2014)."""

_MASK = (1 << 64) - 1


class CountedDraws:
    """Good enough to spread load; not for secrets."""

    def __init__(self, seed: int = 0) -> None:
        self._state = seed & _MASK

    def randrange(self, stop: int) -> int:
        if stop < 1:
            raise ValueError("there is nothing to draw from")
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        mixed = self._state
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        return (mixed ^ (mixed >> 31)) % stop
