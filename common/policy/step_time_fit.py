"""Fits the step-time model to measured steps, and says how far off it is on steps that it has not seen.

Least squares on the *relative* error, so that a short step counts as much as a long one, with coefficients that cannot be
negative: a prediction must not fall when work is added.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from common.policy.least_squares import SquareSums, non_negative_solution
from common.policy.step_time import Chunk, DecodeLine, DecodeTime, PrefillTime

KNEE_GAIN = 0.75
"""A knee is believed where it brings the squared error below this share of one line's."""
PERFECT = 1e-4
"""A squared relative error a sample (here 1 %) that no second line need improve."""
KNEE_SAMPLES = 6
"""On each side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillSample:
    """A step of one chunk alone."""

    tokens: int
    past: int
    seconds: float

    @property
    def row(self) -> tuple[float, ...]:
        return relative(self.seconds, 1.0, self.tokens, self.tokens * (self.past + 0.5 * self.tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSample:
    """A step of several chunks, of prompts alone."""

    chunks: tuple[Chunk, ...]
    seconds: float

    @property
    def row(self) -> tuple[float, ...]:
        tokens = sum(chunk.tokens for chunk in self.chunks)
        pairs = sum(chunk.tokens * (chunk.past + 0.5 * chunk.tokens) for chunk in self.chunks)
        return relative(self.seconds, 1.0, tokens, pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSample:
    """A step of decode rows alone."""

    sequences: int
    kv_tokens: int
    seconds: float

    @property
    def row(self) -> tuple[float, ...]:
        return relative(self.seconds, 1.0, self.kv_tokens, self.sequences)


@dataclass(frozen=True, slots=True, kw_only=True)
class FitError:
    """Relative errors of samples that the fit did not see (leave one out)."""

    mean: float
    worst: float
    samples: int


def fit_prefill(samples: Sequence[PrefillSample]) -> PrefillTime:
    return prefill_of(_coefficients(samples))


def fit_decode(samples: Sequence[DecodeSample]) -> DecodeTime:
    """One line, or two with the knee where two explain the samples much better."""
    whole = _summed(samples)
    line = non_negative_solution(whole)
    best = DecodeTime(line=line_of(line))
    if whole.residual(line) < PERFECT * whole.weight:
        return best
    least = KNEE_GAIN * whole.residual(line)
    below = SquareSums(3)
    ordered = sorted(samples, key=lambda sample: sample.sequences)
    above = _summed(ordered)
    for index, sample in enumerate(ordered[:-KNEE_SAMPLES]):
        below.add(sample.row, 1.0)
        above.add(sample.row, 1.0, -1.0)
        knee = ordered[index + 1].sequences
        if index + 1 < KNEE_SAMPLES or knee == sample.sequences:
            continue
        small, large = non_negative_solution(below), non_negative_solution(above)
        error = below.residual(small) + above.residual(large)
        if error < least:
            least = error
            best = DecodeTime(line=line_of(small), knee=knee, beyond=line_of(large))
    return best


def prefill_error(samples: Sequence[PrefillSample]) -> FitError:
    return _left_out([s.row for s in samples])


def decode_error(samples: Sequence[DecodeSample], fitted: DecodeTime) -> FitError:
    """The knee is taken as given: each side is left out by itself."""
    knee = fitted.knee
    if knee is None:
        return _left_out([s.row for s in samples])
    below = _left_out([s.row for s in samples if s.sequences < knee])
    above = _left_out([s.row for s in samples if s.sequences >= knee])
    count = below.samples + above.samples
    mean = (below.mean * below.samples + above.mean * above.samples) / count
    return FitError(mean=mean, worst=max(below.worst, above.worst), samples=count)


def relative(seconds: float, *columns: float) -> tuple[float, ...]:
    """A row whose target is 1: columns divided by what was measured."""
    if seconds <= 0.0:
        raise ValueError("a step takes time")
    return tuple(column / seconds for column in columns)


def prefill_of(coefficients: Sequence[float]) -> PrefillTime:
    base, token, pair = coefficients
    return PrefillTime(base_s=base, per_token_s=token, per_pair_s=pair)


def line_of(coefficients: Sequence[float]) -> DecodeLine:
    base, kv_token, sequence = coefficients
    return DecodeLine(base_s=base, per_kv_token_s=kv_token, per_sequence_s=sequence)


def _summed(samples: Sequence[PrefillSample] | Sequence[DecodeSample]) -> SquareSums:
    if not samples:
        raise ValueError("nothing was measured")
    sums = SquareSums(3)
    for sample in samples:
        sums.add(sample.row, 1.0)
    return sums


def _coefficients(samples: Sequence[PrefillSample] | Sequence[DecodeSample]) -> list[float]:
    return non_negative_solution(_summed(samples))


def _left_out(rows: Sequence[tuple[float, ...]]) -> FitError:
    sums = SquareSums(3)
    for row in rows:
        sums.add(row, 1.0)
    errors = []
    for row in rows:
        sums.add(row, 1.0, -1.0)
        without = non_negative_solution(sums)
        sums.add(row, 1.0)
        errors.append(abs(sum(a * b for a, b in zip(without, row, strict=True)) - 1.0))
    return FitError(mean=sum(errors) / len(errors), worst=max(errors), samples=len(errors))
