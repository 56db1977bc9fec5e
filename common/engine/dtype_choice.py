"""Which dtype `--dtype auto` takes where two were tried: the quicker one, and float32 unless bfloat16 is worth its rounding.

What counts is a request of 256 prompt tokens and 64 new ones: its time alone, and its share of the time where eight of them run
together. The two are weighed alike (their geometric mean), so that neither a single user nor a full machine decides alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from common.values.kv_layout import KvDtype

PROMPT_TOKENS: Final = 256
NEW_TOKENS: Final = 64
ROWS: Final = 8
WORTH: Final = 1.1
"""How much quicker than float32 another dtype must be: what it rounds is lost, and measurements differ by some percent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DtypeTrial:
    """What was measured of one dtype. `weights` says how they are kept; times are of the whole model."""

    dtype: KvDtype
    weights: str
    prefill_token_s: float
    single_step_s: float
    rows_step_s: float

    @property
    def request_s(self) -> float:
        alone = PROMPT_TOKENS * self.prefill_token_s + NEW_TOKENS * self.single_step_s
        among_others = PROMPT_TOKENS * self.prefill_token_s + NEW_TOKENS * self.rows_step_s / ROWS
        return math.sqrt(alone * among_others)

    def describe(self) -> str:
        kept = self.dtype if self.weights == self.dtype else f"{self.dtype} with {self.weights} weights"
        steps = f"{1e3 * self.single_step_s:.1f} ms a step of one row, {1e3 * self.rows_step_s:.1f} of {ROWS}"
        return f"{kept}: {1 / self.prefill_token_s:.0f} tok/s prefill, {steps}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DtypeChoice:
    """`reason` is for people: what decided, with its figures."""

    dtype: KvDtype
    reason: str


def choose_by_trials(trials: Sequence[DtypeTrial]) -> DtypeChoice:
    """`trials` has one of float32 first, and perhaps others."""
    exact = trials[0]
    best = min(trials, key=lambda trial: trial.request_s)
    chosen = best if exact.request_s >= WORTH * best.request_s else exact
    figures = "; ".join(trial.describe() for trial in (chosen, *(trial for trial in trials if trial is not chosen)))
    return DtypeChoice(dtype=chosen.dtype, reason=f"measured on one core: {figures}")
