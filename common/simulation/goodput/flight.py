"""A request of the simulation: what arrives, and what became of it."""

from dataclasses import dataclass

from common.values.objectives import Objectives, Speed


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """`key`: who asks, for fair shares. `prefix`: names of the prompt's blocks from its beginning on (equal name, equal prefix),
    for the prefix cache."""

    arrived_s: float
    prompt_tokens: int
    output_tokens: int
    request_class: str = ""
    key: str = ""
    prefix: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise ValueError("a request has at least one token in and one out")


class Flight:
    """Times are None until they come. `refused`: admission said no, and nothing was computed. `decoded_steps`: those on workers
    that it has left."""

    __slots__ = (
        "arrival",
        "cached_tokens",
        "decoded_steps",
        "decoding_s",
        "ended_s",
        "first_token_s",
        "gives_way",
        "number",
        "objectives",
        "prefill_started_s",
        "refused",
        "split",
        "unloaded_s",
    )

    def __init__(self, number: int, arrival: Arrival, objectives: Objectives, unloaded_s: float) -> None:
        self.number = number
        self.arrival = arrival
        self.objectives = objectives
        self.unloaded_s = unloaded_s
        self.cached_tokens = 0
        self.decoded_steps = 0
        self.split = True
        self.refused = False
        self.gives_way = False
        self.prefill_started_s: float | None = None
        self.first_token_s: float | None = None
        self.decoding_s: float | None = None
        self.ended_s: float | None = None

    @property
    def deadline(self) -> float:
        """Of the first token."""
        return self.arrival.arrived_s + self.objectives.ttft_for(self.unloaded_s)

    def speed(self, *, first_token_counts: bool = True) -> Speed | None:
        """None where it was refused. TPOT is over the tokens after the first; DistServe divides by all."""
        if self.first_token_s is None or self.ended_s is None:
            return None
        later = self.arrival.output_tokens - first_token_counts
        tpot_s = (self.ended_s - self.first_token_s) / later if later else 0.0
        return Speed(ttft_s=self.first_token_s - self.arrival.arrived_s, tpot_s=tpot_s)
