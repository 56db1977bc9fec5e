"""Answers that are not streamed: collect the events, then one JSON object."""

from collections.abc import Sequence

import msgspec

from common.values.errors import RequestFailed
from common.values.tokens import PositionLogprobs
from services.gateway.openai.logprobs_format import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprobs,
    chat_logprobs,
    completion_logprobs,
    echoed_logprobs,
    prompt_logprobs,
)
from services.gateway.openai.plan import RequestPlan
from services.gateway.openai.usage import Usage
from services.gateway.text.choice_text import TextEvent, TextFinish, TokenRecord

PositionsOfPrompts = Sequence[Sequence[PositionLogprobs] | None]


class AnswerMessage(msgspec.Struct, frozen=True, kw_only=True):
    role: str
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: TextFinish


class ChatAnswer(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: TextFinish
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


class CompletionAnswer(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class WholeAnswer:
    """Add every event, then `encode`."""

    def __init__(self, plan: RequestPlan) -> None:
        self._plan = plan
        self._texts: list[list[str]] = [[] for _ in range(plan.choices)]
        self._records: list[list[TokenRecord]] = [[] for _ in range(plan.choices)]
        self._finish: list[TextFinish | None] = [None] * plan.choices

    def add(self, event: TextEvent) -> None:
        self._texts[event.choice].append(event.text)
        self._records[event.choice] += event.records
        self._finish[event.choice] = event.finish

    def encode(self, usage: Usage, positions: PositionsOfPrompts) -> bytes:
        """`positions` holds the log-probabilities of each prompt's tokens, where they were asked for."""
        plan = self._plan
        if plan.kind == "completion":
            choices = [self._completion_choice(choice, positions[choice // plan.n]) for choice in range(plan.choices)]
            answer = CompletionAnswer(
                id=plan.id, object="text_completion", created=plan.created, model=plan.model, choices=choices, usage=usage
            )
            return msgspec.json.encode(answer)
        return msgspec.json.encode(
            ChatAnswer(
                id=plan.id,
                object="chat.completion",
                created=plan.created,
                model=plan.model,
                choices=[self._chat_choice(choice) for choice in range(plan.choices)],
                usage=usage,
                prompt_logprobs=self._prompt_logprobs(0, positions[0]),
            )
        )

    def _chat_choice(self, choice: int) -> ChatChoice:
        plan = self._plan
        return ChatChoice(
            index=choice,
            message=AnswerMessage(role="assistant", content="".join(self._texts[choice])),
            logprobs=None if plan.logprobs is None else chat_logprobs(self._records[choice], plan.text_model, top=plan.logprobs),
            finish_reason=self._finish_of(choice),
        )

    def _completion_choice(self, choice: int, positions: Sequence[PositionLogprobs] | None) -> CompletionChoice:
        plan = self._plan
        echo = "" if plan.echoes is None else plan.echoes[choice // plan.n]
        return CompletionChoice(
            index=choice,
            text=echo + "".join(self._texts[choice]),
            logprobs=self._completion_logprobs(choice, positions, len(echo)),
            finish_reason=self._finish_of(choice),
            prompt_logprobs=self._prompt_logprobs(choice // plan.n, positions),
        )

    def _completion_logprobs(
        self, choice: int, positions: Sequence[PositionLogprobs] | None, offset: int
    ) -> CompletionLogprobs | None:
        plan = self._plan
        if plan.logprobs is None:
            return None
        own = completion_logprobs(self._records[choice], plan.text_model, top=plan.logprobs, offset=offset)
        if plan.echoes is None or positions is None:
            return own
        return echoed_logprobs(plan.prompts[choice // plan.n], positions, own, plan.text_model, top=plan.logprobs)

    def _prompt_logprobs(self, prompt: int, positions: Sequence[PositionLogprobs] | None) -> PromptLogprobs | msgspec.UnsetType:
        if self._plan.prompt_logprobs is None or positions is None:
            return msgspec.UNSET
        return prompt_logprobs(self._plan.prompts[prompt], positions, self._plan.text_model)

    def _finish_of(self, choice: int) -> TextFinish:
        finish = self._finish[choice]
        if finish is None:
            raise RequestFailed(f"choice {choice} has no end")
        return finish
