"""What a request asks of the mesh's speed, and what it got: TTFT, TPOT, and whether both were good enough."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Objectives:
    """`ttft_s`: until the first token. `ttft_stretch` makes it length-aware: that many times the unloaded prefill of the
    request's own prompt is granted on top, so that one objective is fair to short and long prompts. `tpot_s`: the mean
    time between later tokens."""

    ttft_s: float
    tpot_s: float
    ttft_stretch: float = 0.0

    def __post_init__(self) -> None:
        if self.ttft_s < 0.0 or self.tpot_s <= 0.0 or self.ttft_stretch < 0.0 or self.ttft_s + self.ttft_stretch <= 0.0:
            raise ValueError("objectives are positive times")

    def ttft_for(self, unloaded_prefill_s: float) -> float:
        """The TTFT objective of a prompt that an idle worker computes in that time."""
        return self.ttft_s + self.ttft_stretch * unloaded_prefill_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """TTFT and TPOT of one request, predicted or had. A request of one token has a TPOT of zero."""

    ttft_s: float
    tpot_s: float

    def meets(self, objectives: Objectives, unloaded_prefill_s: float = 0.0) -> bool:
        """Jointly: a request is good only if both hold."""
        return self.ttft_s <= objectives.ttft_for(unloaded_prefill_s) and self.tpot_s <= objectives.tpot_s
