"""A validated request: what to generate and how to answer. Everything after parsing works on this one value."""

from dataclasses import dataclass, field
from typing import Literal

from common.protocol.request_record import IdempotencyMark
from common.values.request_class import WantedSpeed
from common.values.sampling import SamplingParameters
from services.gateway.text.choice_text import ChoiceText
from services.gateway.text.stop_matcher import StopMatcher
from services.gateway.text.text_model import TextModel

Kind = Literal["chat", "completion"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """Whose request it is, and how they may come back to it. `lingers`: it lives on for a while when they leave. `wanted`: how
    fast they want it."""

    tenant: str = ""
    lingers: bool = False
    idempotency: IdempotencyMark | None = None
    wanted: WantedSpeed = field(default_factory=WantedSpeed)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestPlan:
    """`id` is what the client sees. Choice `p * n + c` is choice c of prompt p; every prompt is a request of its own to the
    mesh. `echoes` holds each prompt's text where it is to be shown before the completion. `logprobs` and `prompt_logprobs`
    count alternatives as the client asked for them (the sampling may ask for more, to serve echo). `prompt_tokens` is kept
    apart from the prompts: of an ended request only their last tokens are left."""

    id: str
    kind: Kind
    created: int
    text_model: TextModel
    prompts: tuple[tuple[int, ...], ...]
    prompt_tokens: int
    sampling: SamplingParameters
    n: int = 1
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    stream: bool = False
    include_usage: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echoes: tuple[str, ...] | None = None
    salt: bytes = b""
    deadline_s: float | None = None
    asker: Asker = Asker()

    @property
    def model(self) -> str:
        return self.text_model.card.model.name

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.n

    def choice_text(self, choice: int) -> ChoiceText:
        prompt = self.prompts[choice // self.n]
        return ChoiceText(
            choice=choice,
            detokenizer=self.text_model.detokenizer(skip_special_tokens=self.skip_special_tokens, prompt=prompt),
            stops=StopMatcher(self.stops, include_stop=self.include_stop),
            min_tokens=self.sampling.min_tokens,
        )
