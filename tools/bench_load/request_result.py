"""What became of one request, as its client saw it: all that any figure of `segue bench` is computed from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestResult:
    """Times are seconds from the start of its point. `arrivals_s`: each event that brought text. `output_tokens` and
    `prompt_tokens` are the server's counts where it gives them, else events and what was planned. `stages_s`: named durations
    since it was accepted, from the server's own timeline."""

    number: int
    kind: str
    measured: bool
    scheduled_s: float
    sent_s: float
    ended_s: float
    arrivals_s: tuple[float, ...] = ()
    planned_prompt_tokens: int
    planned_output_tokens: int
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None = None
    error: str | None = None
    request_id: str | None = None
    stages_s: Mapping[str, float] = field(default_factory=dict)

    @property
    def lag_s(self) -> float:
        """How late we sent it: the client's fault, and part of every latency."""
        return self.sent_s - self.scheduled_s

    @property
    def ttft_s(self) -> float | None:
        return self.arrivals_s[0] - self.scheduled_s if self.arrivals_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean over the tokens behind the first; 0 for an answer of one."""
        if not self.arrivals_s:
            return None
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / max(1, self.output_tokens - 1)

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Between arrivals (ITL)."""
        return tuple(later - earlier for earlier, later in pairwise(self.arrivals_s))

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.scheduled_s

    @property
    def is_complete(self) -> bool:
        return self.error is None and bool(self.arrivals_s)
