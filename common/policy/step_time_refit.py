"""Keeps a step-time model true while a worker serves: each step that it ran is a sample.

Old samples fade, so that the model follows a machine that other work slows down. The first steps are not counted (pages are
touched, kernels chosen), and a step that is far off is not believed (the process was stopped for a moment) until most of them
are. The shape of the model it started with stays in as a few samples' worth, at the speed that is seen now: steps that are all
alike cannot unlearn the rest of the line.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from common.policy.least_squares import SquareSums, non_negative_solution
from common.policy.step_time import DecodeLine, DecodeTime, PrefillTime, StepTime
from common.policy.step_time_fit import BatchSample, DecodeSample, PrefillSample, line_of, prefill_of


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitLimits:
    """`kept`: the share of old samples' weight that a new one leaves. `gate`: by how much a believed sample may be slower or
    quicker than predicted. `anchor`: how many samples the starting model counts for. `window`: how many verdicts of the
    gate are looked at: if over half of them were refusals, it is the model that is wrong."""

    kept: float = 0.998
    gate: float = 2.0
    warm_up: int = 16
    anchor: float = 8.0
    window: int = 32


class StepTimeRefit:
    def __init__(self, start: StepTime, limits: RefitLimits | None = None) -> None:
        limits = limits or RefitLimits()
        self._knee = start.decode.knee
        decode = start.decode
        self._prefill = _Line(_prefill_anchors(start.prefill), limits)
        self._below = _Line(_decode_anchors(decode.line, 1, self._knee or 64), limits)
        self._beyond = None
        if decode.beyond is not None and decode.knee is not None:
            self._beyond = _Line(_decode_anchors(decode.beyond, decode.knee, 2 * decode.knee), limits)

    @property
    def refused(self) -> int:
        """Samples that the gate did not believe."""
        lines = (self._prefill, self._below, self._beyond)
        return sum(line.refused for line in lines if line is not None)

    def observe_prefill(self, sample: PrefillSample | BatchSample) -> None:
        self._prefill.observe(sample.row)

    def observe_decode(self, sample: DecodeSample) -> None:
        beyond = self._beyond is not None and self._knee is not None and sample.sequences >= self._knee
        line = self._beyond if beyond and self._beyond is not None else self._below
        line.observe(sample.row)

    def current(self) -> StepTime:
        beyond = None if self._beyond is None else line_of(self._beyond.coefficients)
        decode = DecodeTime(line=line_of(self._below.coefficients), knee=self._knee, beyond=beyond)
        return StepTime(prefill=prefill_of(self._prefill.coefficients), decode=decode)


class _Line:
    """One set of three coefficients."""

    def __init__(self, anchors: Sequence[tuple[float, ...]], limits: RefitLimits) -> None:
        self._limits = limits
        self._anchor = SquareSums(3)
        for row in anchors:
            self._anchor.add(row, 1.0, limits.anchor / len(anchors))
        self._live = SquareSums(3)
        self._slowness = 0.0
        self._verdicts: deque[bool] = deque(maxlen=limits.window)
        self._seen = 0
        self.refused = 0
        self._start = non_negative_solution(self._anchor)
        self.coefficients = self._start

    def observe(self, row: tuple[float, ...]) -> None:
        self._seen += 1
        if self._seen <= self._limits.warm_up:
            return
        predicted = sum(a * b for a, b in zip(self.coefficients, row, strict=True))
        believed = 1.0 / self._limits.gate <= predicted <= self._limits.gate
        self._verdicts.append(believed)
        if not believed and 2 * self._verdicts.count(False) <= self._limits.window:
            self.refused += 1
            return
        self._live.forget(self._limits.kept)
        self._live.add(row, 1.0)
        self._slowness *= self._limits.kept
        self._slowness += 1.0 / max(1e-9, sum(a * b for a, b in zip(self._start, row, strict=True)))
        slower = (1.0 + self._slowness) / (1.0 + self._live.weight)
        self.coefficients = non_negative_solution(self._anchor.stretched(slower).plus(self._live))


def _prefill_anchors(time: PrefillTime) -> list[tuple[float, ...]]:
    shapes = [(tokens, past) for tokens in (16, 64, 256, 1024) for past in (0, 1024)]
    return [PrefillSample(tokens=tokens, past=past, seconds=time.seconds(tokens, past)).row for tokens, past in shapes]


def _decode_anchors(line: DecodeLine, fewest: int, most: int) -> list[tuple[float, ...]]:
    shapes = [(n, n * context) for n in (fewest, (fewest + most) // 2, most) for context in (64, 512, 2048)]
    return [DecodeSample(sequences=n, kv_tokens=kv, seconds=line.seconds(n, kv)).row for n, kv in shapes]
