"""What a structured-output feature gives a step engine: per sequence, which tokens may come next."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.values.step import SequenceStart


class GrammarMask(Protocol):
    """The state of one sequence's grammar. Used by the step's thread only."""

    def allowed(self) -> NDArray[np.int32] | None:
        """A bit for each token, that of token t at `[t // 32] >> (t % 32)`, set where t may come next; None where all may.

        At least as many words as the vocabulary needs, in one piece; it is read before the next call. What is raised fails
        this sequence alone. Where the grammar is complete, the end-of-sequence tokens must be allowed.
        """
        ...

    def accept(self, token: int) -> None:
        """The sequence grew by this token. What is raised fails this sequence alone."""
        ...


class GrammarMasks(Protocol):
    """Makes the masks of sequences as they start."""

    def mask(self, start: SequenceStart) -> GrammarMask | None:
        """None where the sequence is free. The mask has accepted nothing yet: the new tokens that `start` brings come by
        `accept`. What is raised fails this sequence alone."""
        ...
