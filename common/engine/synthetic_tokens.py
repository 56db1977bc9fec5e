"""The tokens of the synthetic engine: a pure function of the prompt and the place of the new token.

Any worker makes the same tokens for the same prompt, with no model loaded, so a mesh test can tell a lost, repeated or
foreign token from the right one.
"""

import math
from collections.abc import Collection, Sequence

import numpy as np
import xxhash

from common.values.tokens import PositionLogprobs

_MASK = 2**64 - 1


def mix(value: int) -> int:
    """splitmix64's finaliser: 64 bits in, 64 well mixed bits out."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def prompt_digest(prompt: Sequence[int]) -> int:
    return int(xxhash.xxh3_64_intdigest(np.asarray(prompt, dtype=np.int64).tobytes()))


def synthetic_token(digest: int, index: int, *, vocab_size: int, avoid: Collection[int] = ()) -> int | None:
    """New token number `index` after the prompt with this `digest`, in [0, vocab_size), none of `avoid`.

    None where `avoid` leaves no token.
    """
    first = mix(digest ^ mix(index)) % vocab_size
    for step in range(vocab_size):
        token = (first + step) % vocab_size
        if token not in avoid:
            return token
    return None


def synthetic_logprobs(token: int, *, alternatives: int, vocab_size: int) -> PositionLogprobs:
    """A well-formed stand-in: the token itself is the best, each alternative half as likely as the one before it."""
    count = min(alternatives, vocab_size)
    top = tuple(((token + place) % vocab_size, -(place + 1) * math.log(2.0)) for place in range(count))
    return PositionLogprobs(logprob=-math.log(2.0), rank=1, top=top)
