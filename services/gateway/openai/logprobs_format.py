"""Log-probabilities in the three shapes that clients know: chat, completions, and vLLM's `prompt_logprobs`."""

from collections.abc import Iterable, Sequence

import msgspec

from common.values.tokens import PositionLogprobs
from services.gateway.text.choice_text import TokenRecord
from services.gateway.text.text_model import TextModel

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot write."""


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob, frozen=True, kw_only=True):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    content: list[ChatTokenLogprob]


class CompletionLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class PromptToken(msgspec.Struct, frozen=True, kw_only=True):
    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptToken] | None]


def chat_logprobs(records: Iterable[TokenRecord], model: TextModel, *, top: int) -> ChatLogprobs:
    return ChatLogprobs(content=[_chat_token(record, model, top) for record in records])


def _chat_token(record: TokenRecord, model: TextModel, top: int) -> ChatTokenLogprob:
    data = model.token_bytes(record.token)
    others = [_top_logprob(token, logprob, model) for token, logprob in record.logprobs.top[:top]]
    return ChatTokenLogprob(
        token=data.decode(errors="replace"), logprob=_finite(record.logprobs.logprob), bytes=list(data), top_logprobs=others
    )


def _top_logprob(token: int, logprob: float, model: TextModel) -> TopLogprob:
    data = model.token_bytes(token)
    return TopLogprob(token=data.decode(errors="replace"), logprob=_finite(logprob), bytes=list(data))


def completion_logprobs(records: Sequence[TokenRecord], model: TextModel, *, top: int, offset: int = 0) -> CompletionLogprobs:
    """`offset` is the length of the text before the completion (its echo)."""
    return CompletionLogprobs(
        tokens=[token_name(record.token, model) for record in records],
        token_logprobs=[_finite(record.logprobs.logprob) for record in records],
        top_logprobs=[_by_name(record.token, record.logprobs, model, top) for record in records] if top else None,
        text_offset=[offset + record.text_offset for record in records],
    )


def echoed_logprobs(
    prompt: Sequence[int], positions: Sequence[PositionLogprobs], completion: CompletionLogprobs, model: TextModel, *, top: int
) -> CompletionLogprobs:
    """The prompt's log-probabilities before those of the completion; the first token of all has none."""
    offsets, length = [], 0
    for token in prompt:
        offsets.append(length)
        length += len(model.token_bytes(token).decode(errors="ignore"))
    tops = [None, *(_by_name(token, at, model, top) for token, at in zip(prompt[1:], positions, strict=True))]
    return CompletionLogprobs(
        tokens=[token_name(token, model) for token in prompt] + completion.tokens,
        token_logprobs=[None, *(_finite(at.logprob) for at in positions), *completion.token_logprobs],
        top_logprobs=None if completion.top_logprobs is None else [*tops, *completion.top_logprobs],
        text_offset=offsets + completion.text_offset,
    )


def prompt_logprobs(prompt: Sequence[int], positions: Sequence[PositionLogprobs], model: TextModel) -> PromptLogprobs:
    """vLLM's shape: per position a map from token id; null for the first."""
    return [None, *(_prompt_position(token, at, model) for token, at in zip(prompt[1:], positions, strict=True))]


def _prompt_position(chosen: int, at: PositionLogprobs, model: TextModel) -> dict[str, PromptToken]:
    ranked = {token: (logprob, place) for place, (token, logprob) in enumerate(at.top, 1)}
    ranked[chosen] = (at.logprob, at.rank)
    return {
        str(token): PromptToken(logprob=_finite(logprob), rank=rank, decoded_token=model.token_bytes(token).decode(errors="replace"))
        for token, (logprob, rank) in ranked.items()
    }


def _by_name(chosen: int, at: PositionLogprobs, model: TextModel, top: int) -> dict[str, float]:
    """The best `top`, and the chosen token where it is not among them."""
    named = {token_name(token, model): _finite(logprob) for token, logprob in at.top[:top]}
    named.setdefault(token_name(chosen, model), _finite(at.logprob))
    return named


def token_name(token: int, model: TextModel) -> str:
    """A token's text, or `bytes:\\xe2\\x80` where it is only a part of a character: names are keys and must differ."""
    data = model.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
