"""Counter-based draws: a uniform number as a pure function of (seed, choice, position).

Nothing is remembered between draws, so a retry, another worker or another batch draws the same number at the same place.
Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF

Counter = tuple[int, int, int, int]


def philox4x32(counter: Counter, key: tuple[int, int]) -> Counter:
    """One block of four 32-bit words; all arguments are 32-bit words too."""
    a, b, c, d = counter
    k, m = key
    for _ in range(_ROUNDS):
        low_product = _MULTIPLIERS[0] * a
        high_product = _MULTIPLIERS[1] * c
        a, b, c, d = (high_product >> 32) ^ b ^ k, high_product & _WORD, (low_product >> 32) ^ d ^ m, low_product & _WORD
        k, m = (k + _WEYL[0]) & _WORD, (m + _WEYL[1]) & _WORD
    return a, b, c, d


def uniform(*, seed: int, choice: int, position: int) -> float:
    """In [0, 1), 53 bits. `position` is the index of the new token, `choice` the place among a request's n."""
    counter = (position & _WORD, (position >> 32) & _WORD, choice & _WORD, 0)
    first, second, _, _ = philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD))
    return float(((first << 32 | second) >> 11) * 2.0**-53)
