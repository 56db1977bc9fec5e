"""A streamed answer as it is read: bytes and times in, arrivals and counts out. Knows no socket and no clock."""

from dataclasses import dataclass, field

import msgspec

MAX_LINE_BYTES = 1 << 22
MAX_ERROR_CHARACTERS = 300


class _Text(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    delta: _Text | None = None
    text: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw(b"null")


_decode = msgspec.json.Decoder(_Chunk).decode


@dataclass(slots=True)
class AnswerReader:
    """Feed it the body of an answer with status 200. After the end, `failure` says what is wrong with it, if anything is."""

    arrivals: list[float] = field(default_factory=list)
    usage: _Usage | None = None
    is_done: bool = False
    _error: str | None = None
    _rest: bytes = b""

    def feed(self, data: bytes, now: float) -> None:
        """Events of OpenAI's streams are one `data:` line each; all else (ids, comments) is skipped."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > MAX_LINE_BYTES:
            self._error, self._rest = "an event of more than 4 MiB", b""
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line[5:].strip(), now)

    @property
    def failure(self) -> str | None:
        if self._error is not None:
            return self._error
        if not self.is_done:
            return "the stream ended early"
        return None if self.arrivals else "an answer without text"

    def _take(self, event: bytes, now: float) -> None:
        if event == b"[DONE]":
            self.is_done = True
            return
        try:
            chunk = _decode(event)
        except msgspec.DecodeError as error:
            self._error = f"an event that is not a chunk: {error}"
            return
        if bytes(chunk.error) != b"null":
            self._error = bytes(chunk.error).decode("utf-8", "replace")[:MAX_ERROR_CHARACTERS]
        self.usage = chunk.usage or self.usage
        if any(map(_has_text, chunk.choices or ())):
            self.arrivals.append(now)


def _has_text(choice: _Choice) -> bool:
    delta = choice.delta
    return bool(choice.text or (delta and (delta.content or delta.reasoning_content or delta.reasoning)))
