"""Tokens on their way out of a worker."""

from dataclasses import dataclass
from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "error"]
"""`stop`: end-of-sequence or a stop token; `length`: max_tokens or the context is reached; `error`: see Ending."""

DEADLINE_CODE = "deadline_exceeded"
"""The error code of an ending by the request's own deadline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionLogprobs:
    """Log-probabilities at one position, natural log, after penalties and bias, before temperature and truncation.

    `top` holds (token, logprob), best first; `rank` is the chosen token's place, 1 for the best.
    """

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """Why a sequence makes no more tokens. A stop token itself is counted but yields no text."""

    reason: FinishReason
    stop_token: int | None = None
    error_code: str | None = None
    error_message: str | None = None


class NewTokens(msgspec.Struct, frozen=True, kw_only=True):
    """Consecutive tokens of one sequence from index `first` on (index 0 is its first new token).

    `logprobs` is as long as `tokens` where asked for, else empty. `prompt_logprobs` comes once, with index 0: one entry
    per prompt position after the first (position 0 has none).
    """

    first: int
    tokens: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs, ...] | None = None
    ending: Ending | None = None
