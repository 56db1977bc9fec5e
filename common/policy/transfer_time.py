"""What a hand-off takes beyond what prefill hides, learnt from those that were made: a base, and a part for each token."""

from dataclasses import dataclass

from common.policy.least_squares import SquareSums, non_negative_solution
from common.policy.step_time_fit import relative

KEPT = 0.98


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferTime:
    base_s: float = 0.0
    per_token_s: float = 0.0

    def seconds(self, tokens: int) -> float:
        return self.base_s + self.per_token_s * tokens


class TransferMeter:
    """Old hand-offs fade. `current` is zero before the first one."""

    def __init__(self) -> None:
        self._sums = SquareSums(2)
        self.current = TransferTime()

    def observe(self, tokens: int, seconds: float) -> None:
        if seconds <= 0.0:
            return
        self._sums.forget(KEPT)
        self._sums.add(relative(seconds, 1.0, float(tokens)), 1.0)
        base_s, per_token_s = non_negative_solution(self._sums)
        self.current = TransferTime(base_s=base_s, per_token_s=per_token_s)
