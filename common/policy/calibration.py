"""What was measured of steps, by `segue calibrate`, and the step-time model fitted to it: the content of a calibration file.

The points stay in the file beside the coefficients, so that whoever doubts a prediction sees how far it was off, and where.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from common.policy.step_time import Chunk, StepTime
from common.policy.step_time_fit import (
    DecodeSample,
    FitError,
    PrefillSample,
    decode_error,
    fit_decode,
    fit_prefill,
    prefill_error,
)

FORMAT = 1
"""Rises when a field changes its meaning. New fields with defaults do not raise it."""
GOOD_ERROR = 0.05
FAIR_ERROR = 0.15
"""Mean relative errors of steps that a fit has not seen, up to which it is called that."""
Confidence = Literal["good", "fair", "poor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSubject:
    """Whose steps they are. `weights` is the digest of a worker's fingerprint. Of a server that was measured from outside,
    `endpoint`, only `model` is known besides."""

    model: str
    cpu: str = ""
    weights: str = ""
    dtype: str = ""
    kernels: str = ""
    device: str = ""
    threads: int = 0
    endpoint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPoint:
    """`sample.seconds` is the median of `visits`; half of them lie within `spread` of it, as a share of it."""

    sample: PrefillSample
    visits: int = 1
    spread: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePoint:
    """As PrefillPoint."""

    sample: DecodeSample
    visits: int = 1
    spread: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedPoint:
    """A chunk in one step with decode rows. No coefficient is fitted to it: it shows how far the model's sum of both holds."""

    tokens: int
    past: int
    sequences: int
    kv_tokens: int
    seconds: float
    visits: int = 1
    spread: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedStepTime:
    """A model, and its relative errors on steps that were left out of the fit."""

    step_time: StepTime
    prefill_error: FitError
    decode_error: FitError

    @property
    def confidence(self) -> Confidence:
        mean = max(self.prefill_error.mean, self.decode_error.mean)
        return "good" if mean <= GOOD_ERROR else "fair" if mean <= FAIR_ERROR else "poor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """`measured_at`: seconds since 1970. `round_trip_s` and `request_overhead_s`: of a server measured from outside, what a
    request takes that is no step; both are part of its TTFT and not of the model."""

    format: int = FORMAT
    subject: CalibrationSubject
    build: str
    measured_at: float
    fitted: FittedStepTime
    prefill: tuple[PrefillPoint, ...]
    decode: tuple[DecodePoint, ...]
    mixed: tuple[MixedPoint, ...] = ()
    round_trip_s: float = 0.0
    request_overhead_s: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def step_time(self) -> StepTime:
        return self.fitted.step_time


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """What a step took, and what the model says; `error` is relative, above 0 where the model says too much."""

    what: str
    measured_s: float
    predicted_s: float
    spread: float

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1.0


def fit_step_time(prefill: Sequence[PrefillSample], decode: Sequence[DecodeSample]) -> FittedStepTime:
    """Raises ValueError where there is nothing to fit."""
    decode_time = fit_decode(decode)
    return FittedStepTime(
        step_time=StepTime(prefill=fit_prefill(prefill), decode=decode_time),
        prefill_error=prefill_error(prefill),
        decode_error=decode_error(decode, decode_time),
    )


def residuals(calibration: Calibration) -> list[Residual]:
    """Of every point, prefill before decode before mixed."""
    time = calibration.step_time
    rows: list[Residual] = []
    for chunk in calibration.prefill:
        one = chunk.sample
        what = f"prefill {one.tokens} after {one.past}"
        rows.append(_residual(what, one.seconds, time.prefill.seconds(one.tokens, one.past), chunk.spread))
    for step in calibration.decode:
        row = step.sample
        what = f"decode {row.sequences} x {row.kv_tokens / row.sequences:.0f}"
        rows.append(_residual(what, row.seconds, time.decode.seconds(row.sequences, row.kv_tokens), step.spread))
    for both in calibration.mixed:
        what = f"{both.tokens} after {both.past} beside {both.sequences} x {both.kv_tokens / both.sequences:.0f}"
        predicted = time.mixed_s([Chunk(tokens=both.tokens, past=both.past)], both.sequences, both.kv_tokens)
        rows.append(_residual(what, both.seconds, predicted, both.spread))
    return rows


def _residual(what: str, measured_s: float, predicted_s: float, spread: float) -> Residual:
    return Residual(what=what, measured_s=measured_s, predicted_s=predicted_s, spread=spread)
