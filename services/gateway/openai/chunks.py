"""Server-sent events of a stream.

All of a chunk but its text is the same for every token of a choice, so it is written once; a token costs one `orjson.dumps`
of its text and a join. An event's id is the number of tokens consumed, per choice (`17`, or `17.9` for two choices).
"""

from collections.abc import Sequence

import msgspec
import orjson

from services.gateway.openai.error_object import ErrorObject
from services.gateway.openai.event_id import format_event_id
from services.gateway.openai.logprobs_format import chat_logprobs, completion_logprobs
from services.gateway.openai.plan import RequestPlan
from services.gateway.openai.usage import Usage
from services.gateway.text.choice_text import TextEvent

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
_FINISH = {None: b"null", "stop": b'"stop"', "length": b'"length"'}


class ChunkEncoder:
    """Stateful: knows which choices have begun, and what each has consumed. Events up to `position`, what each choice of a
    resuming client has consumed, are skipped."""

    def __init__(self, plan: RequestPlan, position: Sequence[int] | None = None) -> None:
        self._plan = plan
        self._position = tuple(position or (0,) * plan.choices)
        self._chat = plan.kind == "chat"
        self._consumed = list(self._position)
        self._begun = [False] * plan.choices
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        self._head = (
            f'data: {{"id":"{plan.id}","object":"{kind}","created":{plan.created},"model":'.encode()
            + orjson.dumps(plan.model)
            + b',"choices":['
        )
        text_field = '"delta":{"content":' if self._chat else '"text":'
        self._choice_heads = [self._head + f'{{"index":{choice},{text_field}'.encode() for choice in range(plan.choices)]
        self._after_text = (b"}" if self._chat else b"") + b',"logprobs":'
        self._end = b'}],"usage":null}\n\n' if plan.include_usage else b"}]}\n\n"
        self._plain_tail = self._after_text + b'null,"finish_reason":null' + self._end

    def event(self, event: TextEvent) -> bytes:
        """The bytes of one event; none where the client has it."""
        choice = event.choice
        if event.consumed <= self._position[choice] and not (event.is_lone and event.consumed == self._position[choice]):
            self._begun[choice] = True
            return b""
        self._consumed[choice] = event.consumed
        if len(self._consumed) == 1:
            ident = b"id: %d\n" % event.consumed
        else:
            ident = b"id: " + format_event_id(self._consumed).encode() + b"\n"
        text, head = event.text, self._choice_heads[choice]
        if not self._begun[choice]:
            self._begun[choice] = True
            if self._chat:
                head = head.replace(b'"delta":{', b'"delta":{"role":"assistant",')
            elif self._plan.echoes is not None:
                text = self._plan.echoes[choice // self._plan.n] + text
        if event.finish is None and self._plan.logprobs is None:
            return ident + head + orjson.dumps(text) + self._plain_tail
        tail = self._after_text + self._logprobs(event) + b',"finish_reason":' + _FINISH[event.finish] + self._end
        return ident + head + orjson.dumps(text) + tail

    def _logprobs(self, event: TextEvent) -> bytes:
        plan = self._plan
        if plan.logprobs is None:
            return b"null"
        if self._chat:
            return msgspec.json.encode(chat_logprobs(event.records, plan.text_model, top=plan.logprobs))
        return msgspec.json.encode(completion_logprobs(event.records, plan.text_model, top=plan.logprobs))

    def usage(self, usage: Usage) -> bytes:
        return self._head + b'],"usage":' + msgspec.json.encode(usage) + b"}\n\n"


def error_event(error: ErrorObject) -> bytes:
    """A failure after the 200: what the client has is all there will be."""
    return b"data: " + msgspec.json.encode(error) + b"\n\n"
