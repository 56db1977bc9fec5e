"""What the planner chooses among: every split of the workers, placed strictly or freely, and no split at all."""

from dataclasses import dataclass, replace
from typing import Literal

from common.simulation.goodput.deployment import Deployment

Kind = Literal["split", "free", "colocated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """`decode` zero: all workers are colocated, and `prefill` counts them."""

    kind: Kind
    prefill: int
    decode: int = 0

    @property
    def name(self) -> str:
        match self.kind:
            case "split":
                return f"{self.prefill}:{self.decode}"
            case "free":
                return f"{self.prefill}:{self.decode} free"
            case "colocated":
                return f"{self.prefill} colocated"

    def deployed(self, like: Deployment) -> Deployment:
        """On workers, limits and policies as `like` has them."""
        policies = replace(like.policies, free=self.kind == "free")
        if self.kind == "colocated":
            return replace(like, prefill=0, decode=0, both=self.prefill, policies=policies)
        return replace(like, prefill=self.prefill, decode=self.decode, both=0, policies=policies)


def candidates(workers: int) -> list[Candidate]:
    splits = [(prefill, workers - prefill) for prefill in range(1, workers)]
    return [
        *(Candidate(kind="split", prefill=prefill, decode=decode) for prefill, decode in splits),
        *(Candidate(kind="free", prefill=prefill, decode=decode) for prefill, decode in splits),
        Candidate(kind="colocated", prefill=workers),
    ]
