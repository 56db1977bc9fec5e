"""The bodies of `/v1/chat/completions` and `/v1/completions`, parsed strictly.

Names and meanings are OpenAI's and, for the sampling extensions, vLLM's. Unknown fields are ignored; a field that is known,
not supported, and would change the meaning of the answer is refused with its name.
"""

import re
from typing import TypeVar

import msgspec

from common.values.errors import InvalidRequest

Json = dict[str, object]


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    type: str


class FunctionCall(msgspec.Struct, kw_only=True):
    name: str
    arguments: str | Json = ""


class ToolCall(msgspec.Struct, kw_only=True):
    id: str = ""
    type: str = "function"
    function: FunctionCall


class ContentPart(msgspec.Struct, kw_only=True):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, kw_only=True, omit_defaults=True):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class CommonBody(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What both routes take. `None` everywhere means the default, as an absent field does."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    best_of: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    cache_salt: str | None = None
    user: str | None = None
    metadata: Json | None = None
    response_format: ResponseFormat | None = None
    # Known and refused: see `_UNSUPPORTED`.
    use_beam_search: object = None
    bad_words: object = None
    guided_json: object = None
    guided_regex: object = None
    guided_choice: object = None
    guided_grammar: object = None
    structured_outputs: object = None
    truncate_prompt_tokens: object = None
    return_tokens_as_token_ids: object = None


class ChatBody(CommonBody, kw_only=True, omit_defaults=True):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: Json | None = None
    echo: object = None
    continue_final_message: object = None
    functions: object = None
    function_call: object = None
    audio: object = None
    modalities: list[str] | None = None
    web_search_options: object = None
    documents: object = None


class CompletionBody(CommonBody, kw_only=True, omit_defaults=True):
    """`prompt`: a text, token ids, or a list of texts or of lists of token ids."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    suffix: object = None
    prompt_embeds: object = None


_UNSUPPORTED = (
    *("use_beam_search", "bad_words", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"),
    *("truncate_prompt_tokens", "return_tokens_as_token_ids"),
    *("continue_final_message", "functions", "function_call", "audio", "web_search_options", "documents"),
    *("suffix", "prompt_embeds"),
)
_PATH = re.compile(r" - at `\$\.?(.*?)`$")
_MISSING = re.compile(r"missing required field `(.+?)`")

BodyType = TypeVar("BodyType", bound=CommonBody)


def parse_chat_body(raw: bytes | str) -> ChatBody:
    """Raises InvalidRequest, `param` naming the field."""
    body = _parsed(raw, ChatBody)
    if body.echo:
        raise InvalidRequest("echo is for /v1/completions only", param="echo")
    if body.modalities and body.modalities != ["text"]:
        raise InvalidRequest("only the modality text is supported", param="modalities")
    if not (body.tool_choice is None or body.tool_choice in ("auto", "none")):
        raise InvalidRequest("tool_choice may be none or auto: a call cannot be forced", param="tool_choice")
    if not body.messages:
        raise InvalidRequest("messages must hold at least one message", param="messages")
    return body


def parse_completion_body(raw: bytes | str) -> CompletionBody:
    """Raises InvalidRequest, `param` naming the field."""
    return _parsed(raw, CompletionBody)


def _parsed(raw: bytes | str, kind: type[BodyType]) -> BodyType:
    try:
        body = msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        message = str(error)
        path, missing = _PATH.search(message), _MISSING.search(message)
        param = ".".join(part for part in (path and path.group(1), missing and missing.group(1)) if part)
        raise InvalidRequest(message.replace("Object missing", "missing"), param=param or None) from error
    except (msgspec.DecodeError, UnicodeError) as error:
        raise InvalidRequest(f"the body is no valid JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error
    for name in _UNSUPPORTED:
        if getattr(body, name, None) not in (None, False, "", [], {}, "none"):
            raise InvalidRequest(f"{name} is not supported", param=name)
    if body.response_format is not None and body.response_format.type != "text":
        raise InvalidRequest(f"response_format {body.response_format.type} is not supported, only text", param="response_format")
    if body.best_of is not None and body.best_of != (1 if body.n is None else body.n):
        raise InvalidRequest("best_of is not supported: every choice is returned, so it can only equal n", param="best_of")
    return body
