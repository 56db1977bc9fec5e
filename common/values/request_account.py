"""What a request was promised, where it was placed and why, and what it got: kept with its record, and counted."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.values.objectives import Speed


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestAccount:
    """`ttft_s` and `tpot_s` are its objectives. `had` is None where it ended before its time. `stages` are seconds by stage, as the
    workers stamped them."""

    request_class: str
    placement: str = ""
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    best_effort: bool = False
    gives_way: bool = False
    predicted: Speed | None = None
    had: Speed | None = None
    stages: Mapping[str, float] = field(default_factory=dict)

    @property
    def in_time(self) -> bool:
        return self.had is not None and self.had.ttft_s <= self.ttft_s

    @property
    def keeps_pace(self) -> bool:
        return self.had is not None and self.had.tpot_s <= self.tpot_s
