"""A validated request: what to generate and how to answer. Everything after parsing works on this one value."""

from dataclasses import dataclass
from typing import Literal

from common.ports.generation import GenerationRequest
from common.values.ids import RequestId
from common.values.sampling import SamplingParameters
from services.gateway.text.choice_text import ChoiceText
from services.gateway.text.stop_matcher import StopMatcher
from services.gateway.text.text_model import TextModel

Kind = Literal["chat", "completion"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestPlan:
    """`id` is what the client sees. Choice `p * n + c` is choice c of prompt p; every prompt is a request of its own to the
    mesh. `echoes` holds each prompt's text where it is to be shown before the completion. `logprobs` and `prompt_logprobs`
    count alternatives as the client asked for them (the sampling may ask for more, to serve echo)."""

    id: str
    kind: Kind
    created: int
    text_model: TextModel
    prompts: tuple[tuple[int, ...], ...]
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
    body: bytes = b""
    salt: bytes = b""
    deadline_s: float | None = None

    @property
    def model(self) -> str:
        return self.text_model.card.model.name

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.n

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    def requests(self) -> list[GenerationRequest]:
        several = len(self.prompts) > 1
        return [
            GenerationRequest(
                request_id=RequestId(f"{self.id}-{place}" if several else self.id),
                model=self.model,
                prompt=prompt,
                sampling=self.sampling,
                choices=self.n,
                body=self.body,
                salt=self.salt,
                deadline_s=self.deadline_s,
            )
            for place, prompt in enumerate(self.prompts)
        ]

    def choice_text(self, choice: int) -> ChoiceText:
        prompt = self.prompts[choice // self.n]
        return ChoiceText(
            choice=choice,
            detokenizer=self.text_model.detokenizer(skip_special_tokens=self.skip_special_tokens, prompt=prompt),
            stops=StopMatcher(self.stops, include_stop=self.include_stop),
            min_tokens=self.sampling.min_tokens,
        )
