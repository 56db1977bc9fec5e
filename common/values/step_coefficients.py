"""The step-time model as numbers, for whoever must carry it: a worker's snapshot, a calibration file.

What they mean, and how a time comes from them, is said in `common/policy/step_time`.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCoefficients:
    """Seconds, all of them. `beyond` are the decode line's base, per KV token and per sequence from `knee` sequences on."""

    prefill_base_s: float
    prefill_per_token_s: float
    prefill_per_pair_s: float
    decode_base_s: float
    decode_per_kv_token_s: float
    decode_per_sequence_s: float
    knee: int | None = None
    beyond: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        if (self.knee is None) != (self.beyond is None) or (self.knee is not None and self.knee < 1):
            raise ValueError("a knee is at least 1 and has a line beyond it")
        times = (
            *(self.prefill_base_s, self.prefill_per_token_s, self.prefill_per_pair_s),
            *(self.decode_base_s, self.decode_per_kv_token_s, self.decode_per_sequence_s),
            *(self.beyond or ()),
        )
        if not all(math.isfinite(time) and time >= 0.0 for time in times):
            raise ValueError("the coefficients of a step time are numbers from 0 on")
