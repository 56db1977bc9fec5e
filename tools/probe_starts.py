"""The sequences that measurements of steps are made with: random tokens, greedy, never ended by the model."""

import random

from common.values.sampling import SamplingParameters
from common.values.step import SequenceStart

MOST_TOKENS = 1_000


def probe_start(handle: int, length: int, *, vocab_size: int, draws: random.Random) -> SequenceStart:
    """A prompt of `length` tokens."""
    return SequenceStart(
        handle=handle,
        choice=0,
        prompt_length=length,
        tokens=tuple(draws.choices(range(vocab_size), k=length)),
        sampling=SamplingParameters(max_tokens=MOST_TOKENS, seed=0, temperature=0.0, ignore_eos=True),
        eos_token_ids=(),
    )
