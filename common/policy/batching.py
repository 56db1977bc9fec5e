"""What goes into the next step: decode rows first, then chunks of prompts, within a budget of tokens.

The budget bounds how long a step may take and so how long a running stream waits for its next token while a prompt is
computed beside it (chunked prefill, as in Sarathi-Serve). A worker without decodes gives the whole budget to prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """`max_tokens`: positions computed in one step; `max_sequences`: sequences that hold blocks and run at a time."""

    max_tokens: int = 256
    max_sequences: int = 64

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.max_sequences < 1:
            raise ValueError("step limits are at least 1")


def share_budget(remaining: Sequence[int], limits: StepLimits) -> list[int]:
    """How many positions each sequence may compute in this step, in the order given (oldest first).

    `remaining` counts the positions each sequence still has to compute; 1 is a decode row (or a prompt's last position).
    Decode rows come first, so that no stream waits for a prompt; every one of them is served where the budget allows at
    all. What is left goes to prompts in order; only the last one served may be cut.
    """
    granted = [0] * len(remaining)
    budget = limits.max_tokens
    for i, count in enumerate(remaining):
        if count == 1 and budget > 0:
            granted[i] = 1
            budget -= 1
    for i, count in enumerate(remaining):
        if count > 1 and budget > 0:
            granted[i] = min(count, budget)
            budget -= granted[i]
    return granted
