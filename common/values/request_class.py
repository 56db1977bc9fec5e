"""Classes of requests: the speed that an operator promises to each, and what a single request asks for within its class."""

from dataclasses import dataclass
from typing import Literal

LatePolicy = Literal["refuse", "best_effort"]
"""What becomes of a request that cannot be in time: it is told so at once, or served behind those that can."""
DEFAULT_CLASS = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedSpeed:
    """What a request asks for. An objective that nobody named is None: it is derived from the mesh's own speed. `account` is
    whose share of the class it counts to."""

    request_class: str = DEFAULT_CLASS
    ttft_s: float | None = None
    tpot_s: float | None = None
    late: LatePolicy = "best_effort"
    account: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestClass:
    """`ttft_s` and `tpot_s` are what its requests get unless they ask for less, and the tightest that they may ask for; None:
    derived, and any may be asked for."""

    name: str
    ttft_s: float | None = None
    tpot_s: float | None = None
    late: LatePolicy = "best_effort"

    def __post_init__(self) -> None:
        if not self.name or not all(value is None or value > 0.0 for value in (self.ttft_s, self.tpot_s)):
            raise ValueError("a class has a name, and its objectives are positive times")

    def wanted(self, *, ttft_s: float | None, tpot_s: float | None, account: str) -> WantedSpeed:
        """Raises ValueError, naming the objective, for one that is tighter than the class allows."""
        for name, value, least in (("ttft", ttft_s, self.ttft_s), ("tpot", tpot_s, self.tpot_s)):
            if value is not None and least is not None and value < least:
                raise ValueError(name)
        return WantedSpeed(
            request_class=self.name,
            ttft_s=self.ttft_s if ttft_s is None else ttft_s,
            tpot_s=self.tpot_s if tpot_s is None else tpot_s,
            late=self.late,
            account=account,
        )
