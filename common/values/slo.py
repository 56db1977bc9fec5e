"""What latency is wanted: the promise that bounds and placements are derived from."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Seconds to the first token, and between two tokens of a stream."""

    ttft_s: float = 2.0
    tpot_s: float = 0.1
