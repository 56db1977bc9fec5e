"""Frames of `/v1/stream`: JSON text, one object each.

| from | type | fields |
| --- | --- | --- |
| client | `auth` | `api_key`; the first frame where the handshake carried no key |
| client | `generate` | `id`, and the body of a chat (`messages`) or a completion (`prompt`); objectives in `metadata` |
| client | `cancel` | `id` |
| client | `resume` | `id` (new), `request_id`, `last_event_id`: tokens that it has (the last `index` + 1) per choice, as in `17.9` |
| server | `ready` | answer to `auth` |
| server | `accepted` | `id`, `request_id`: by this one a request can be resumed, here or at `/v1/streams/{request_id}` |
| server | `token` | `id`, `choice`, `index` (of the token that yields the text), `text`, `logprobs` where asked for |
| server | `done` | `id`, `request_id`, `choices` (`choice`, `finish_reason`: stop, length or cancelled), `usage` |
| server | `error` | `id` (null where the frame had none), `error` as over HTTP |

Each `generate` and each `resume` is answered by exactly one `done` or `error`. What a connection had begun lives on for 30 s
after it has gone.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
import orjson

from common.values.errors import InvalidRequest, SegueError
from services.gateway.openai.error_object import ErrorBody, error_object
from services.gateway.openai.logprobs_format import chat_logprobs, completion_logprobs
from services.gateway.openai.plan import RequestPlan
from services.gateway.openai.usage import Usage
from services.gateway.text.choice_text import TextEvent

ClientId = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]


class AuthFrame(msgspec.Struct, frozen=True, tag="auth"):
    api_key: str


class GenerateFrame(msgspec.Struct, frozen=True, tag="generate"):
    """Only what is needed before the body is parsed, which is the frame itself."""

    id: ClientId
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    metadata: dict[str, object] | None = None

    @property
    def is_chat(self) -> bool:
        return bytes(self.messages) not in (b"", b"null")

    @property
    def is_completion(self) -> bool:
        return bytes(self.prompt) not in (b"", b"null")


class CancelFrame(msgspec.Struct, frozen=True, tag="cancel"):
    id: ClientId


class ResumeFrame(msgspec.Struct, frozen=True, tag="resume"):
    id: ClientId
    request_id: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    last_event_id: str = ""


ClientFrame = AuthFrame | GenerateFrame | CancelFrame | ResumeFrame


class _FrameId(msgspec.Struct, frozen=True):
    id: str | None = None


class _ChoiceEnd(msgspec.Struct, frozen=True, kw_only=True):
    choice: int
    finish_reason: Literal["stop", "length", "cancelled"]


class _Accepted(msgspec.Struct, frozen=True, kw_only=True, tag="accepted"):
    id: str
    request_id: str


class _Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    id: str
    request_id: str | None
    choices: list[_ChoiceEnd]
    usage: Usage | None


class _Error(msgspec.Struct, frozen=True, kw_only=True, tag="error"):
    id: str | None
    error: ErrorBody


def parse_frame(text: str) -> ClientFrame:
    """Raises InvalidRequest."""
    try:
        frame: ClientFrame = msgspec.json.decode(text, type=ClientFrame)
        return frame
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"not a frame of this protocol: {error}", param="type") from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InvalidRequest(f"the frame is no valid JSON: {error}") from error


def frame_id(text: str) -> str | None:
    """The id of a frame that could not be parsed, if it can be seen."""
    try:
        return msgspec.json.decode(text, type=_FrameId).id
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None


def error_frame(client_id: str | None, error: SegueError) -> str:
    return msgspec.json.encode(_Error(id=client_id, error=error_object(error).error)).decode()


def accepted_frame(client_id: str, plan: RequestPlan) -> str:
    return msgspec.json.encode(_Accepted(id=client_id, request_id=plan.id)).decode()


READY_FRAME = '{"type":"ready"}'


class FrameEncoder:
    """Frames of one request. As in an event stream, a token costs one `orjson.dumps` of its text."""

    def __init__(self, client_id: str, plan: RequestPlan, position: Sequence[int] | None = None) -> None:
        self._id = client_id
        self._position = tuple(position or (0,) * plan.choices)
        self._plan = plan
        head = '{"type":"token","id":' + orjson.dumps(client_id).decode() + ',"choice":'
        self._heads = [f'{head}{choice},"index":' for choice in range(plan.choices)]
        self._begun = [False] * plan.choices
        self._ends: list[Literal["stop", "length"] | None] = [None] * plan.choices

    def token(self, event: TextEvent) -> str:
        """Empty where the event only ends its choice, or the client has it."""
        text = event.text
        self._ends[event.choice] = event.finish
        if event.consumed <= self._position[event.choice]:
            self._begun[event.choice] = True
            return ""
        if not self._begun[event.choice]:
            self._begun[event.choice] = True
            if self._plan.echoes is not None:
                text = self._plan.echoes[event.choice // self._plan.n] + text
        if not text and not event.records:
            return ""
        head = f'{self._heads[event.choice]}{event.consumed - 1},"text":{orjson.dumps(text).decode()}'
        return head + (f',"logprobs":{self._logprobs(event)}}}' if self._plan.logprobs is not None else "}")

    def _logprobs(self, event: TextEvent) -> str:
        plan = self._plan
        shape = chat_logprobs if plan.kind == "chat" else completion_logprobs
        return msgspec.json.encode(shape(event.records, plan.text_model, top=plan.logprobs or 0)).decode()

    def done(self, usage: Usage) -> str:
        """Choices that have not finished were cancelled."""
        ends = [_ChoiceEnd(choice=choice, finish_reason=end or "cancelled") for choice, end in enumerate(self._ends)]
        return msgspec.json.encode(_Done(id=self._id, request_id=self._plan.id, choices=ends, usage=usage)).decode()


def never_begun(client_id: str) -> str:
    """The `done` of a request that was cancelled before it was admitted."""
    return msgspec.json.encode(_Done(id=client_id, request_id=None, choices=[], usage=None)).decode()
