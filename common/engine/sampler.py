"""What draws the next token of each row, and scores given ones.

A row's token depends on its own logits, parameters, seed, choice and position alone. There are two that draw the same tokens: the
kernels' (native/native_sampler.py), and torch's (torch_sampler.py), which is the definition, and serves where there are no
kernels and where the logits are not in this machine's memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from common.engine.sequence_state import SequenceState
from common.values.tokens import PositionLogprobs

NOT_FINITE = "the model's logits are not finite"
ALL_MASKED = "no token is left to draw: all are masked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A token, or why none can be drawn from this row."""

    token: int = 0
    logprobs: PositionLogprobs | None = None
    fault: str | None = None


class Sampler(Protocol):
    """Used by one thread only."""

    def prepare_thread(self, threads: int) -> None:
        """Called in the thread that will draw, before the first step: `threads` compute threads may be used."""
        ...

    def draw(self, logits: torch.Tensor, states: Sequence[SequenceState]) -> list[Drawn]:
        """One row of float32 `logits` `[rows, vocabulary]` for each state. Changes `logits`, leaves the states as they are."""
        ...

    def score(self, logits: torch.Tensor, tokens: Sequence[int], alternatives: int) -> list[PositionLogprobs] | None:
        """The log-probability of one given token in each row, as it stands; None where a row is not finite."""
        ...
