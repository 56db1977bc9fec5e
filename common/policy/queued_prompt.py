"""A prompt that waits for a prefill worker."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedPrompt:
    """`tokens` are still to compute after `past`; `work_s`: their predicted time in a step of their own. The deadline is
    arrival plus a TTFT objective (length-aware where the objective is), less what follows the prefill. `gives_way`: its key has had
    more than its share, or it was admitted without a promise (feasible first serves it after the others)."""

    handle: int
    tokens: int
    arrived_at: float
    deadline: float
    work_s: float
    past: int = 0
    gives_way: bool = False
