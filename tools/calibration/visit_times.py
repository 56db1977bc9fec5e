"""From the times of many visits to points: the median of each shape, and how far the visits lie apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from common.policy.calibration import DecodePoint, MixedPoint, PrefillPoint
from common.policy.step_time_fit import DecodeSample, PrefillSample
from tools.calibration.step_shapes import ChunkShape, MixedShape, RowsShape, StepShape


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPoints:
    prefill: tuple[PrefillPoint, ...]
    decode: tuple[DecodePoint, ...]
    mixed: tuple[MixedPoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Middle:
    """`spread`: half of the times lie within that share of the median."""

    seconds: float
    spread: float
    visits: int


def middle_of(times: Sequence[float]) -> Middle:
    centre = median(times)
    spread = median(abs(time - centre) for time in times) / centre if centre else 0.0
    return Middle(seconds=centre, spread=spread, visits=len(times))


def points_of(times: Mapping[StepShape, Sequence[float]]) -> StepPoints:
    """In the order of the shapes."""
    prefill: list[PrefillPoint] = []
    decode: list[DecodePoint] = []
    mixed: list[MixedPoint] = []
    for shape, measured in times.items():
        middle = middle_of(measured)
        match shape:
            case ChunkShape():
                chunk = PrefillSample(tokens=shape.tokens, past=shape.past, seconds=middle.seconds)
                prefill.append(PrefillPoint(sample=chunk, visits=middle.visits, spread=middle.spread))
            case RowsShape():
                rows = DecodeSample(sequences=shape.rows, kv_tokens=shape.positions, seconds=middle.seconds)
                decode.append(DecodePoint(sample=rows, visits=middle.visits, spread=middle.spread))
            case MixedShape():
                mixed.append(
                    MixedPoint(
                        tokens=shape.chunk.tokens,
                        past=shape.chunk.past,
                        sequences=shape.rows.rows,
                        kv_tokens=shape.rows.positions,
                        seconds=middle.seconds,
                        visits=middle.visits,
                        spread=middle.spread,
                    )
                )
    return StepPoints(prefill=tuple(prefill), decode=tuple(decode), mixed=tuple(mixed))
