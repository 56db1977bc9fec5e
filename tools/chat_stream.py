"""One streamed answer of an OpenAI-compatible server: text as it comes, and the figures of how it came."""

import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import httpx

from common.values.errors import SegueError


class ChatFailed(SegueError):
    """The server cannot be reached, or refuses; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


@dataclass(slots=True)
class Answer:
    """Grows while it streams. Times are seconds from the request; `tokens` is the server's count where it gives one,
    else the number of pieces of text."""

    text: str = ""
    tokens: int = 0
    first_at: float | None = None
    last_at: float = 0.0
    finish_reason: str | None = None

    def add(self, piece: str, at: float) -> None:
        self.text += piece
        self.tokens += 1
        self.first_at = at if self.first_at is None else self.first_at
        self.last_at = at

    def figures(self, *, was_stopped: bool) -> str:
        if self.first_at is None:
            return "(stopped before the first token)" if was_stopped else "(no text)"
        between = self.last_at - self.first_at
        speed = f", {(self.tokens - 1) / between:.1f} tokens/s" if self.tokens > 1 and between > 0 else ""
        end = "stopped" if was_stopped else {"length": "cut at its longest", "stop": ""}.get(self.finish_reason or "", "")
        return f"({self.tokens} tokens, TTFT {self.first_at * 1000:.0f} ms{speed}{', ' + end if end else ''})"


async def first_model(client: httpx.AsyncClient) -> str:
    try:
        response = await client.get("/v1/models")
    except httpx.HTTPError as error:
        raise _unreachable(client, error) from None
    _raise_for_refusal(response.status_code, response.content)
    models = [str(item["id"]) for item in response.json().get("data", [])]
    if not models:
        raise ChatFailed("the server serves no model yet; wait until its workers are ready")
    return models[0]


async def stream_answer(
    client: httpx.AsyncClient,
    model: str,
    messages: Sequence[Message],
    answer: Answer,
    *,
    write: Callable[[str], None],
    max_tokens: int,
    temperature: float | None,
) -> None:
    """Fill `answer` and `write` its text, piece by piece. Raises ChatFailed."""
    body: dict[str, object] = {
        "model": model,
        "messages": [{"role": message.role, "content": message.content} for message in messages],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": max_tokens,
    }
    if temperature is not None:
        body["temperature"] = temperature
    began = time.monotonic()
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                _raise_for_refusal(response.status_code, await response.aread())
            async for event in _events(response):
                _take(event, answer, write, time.monotonic() - began)
    except httpx.HTTPError as error:
        raise _unreachable(client, error) from None


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, object]]:
    """The JSON objects of a server-sent event stream, up to [DONE]."""
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        if isinstance(event, dict):
            yield event
    raise ChatFailed("the connection ended in the middle of the answer")


def _take(event: dict[str, object], answer: Answer, write: Callable[[str], None], at: float) -> None:
    error, choices, usage = event.get("error"), event.get("choices"), event.get("usage")
    if isinstance(error, dict):
        raise ChatFailed(f"the server ended the answer: {error.get('message', error)}")
    for choice in choices if isinstance(choices, list) else ():
        piece = choice.get("delta", {}).get("content")
        if piece:
            answer.add(piece, at)
            write(piece)
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
        answer.tokens = usage["completion_tokens"]


def _raise_for_refusal(status: int, content: bytes) -> None:
    if status < 400:
        return
    try:
        message = str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = content[:200].decode("utf-8", "replace")
    hint = "; give --api-key" if status == 401 else ""
    raise ChatFailed(f"the server says {status}: {message}{hint}")


def _unreachable(client: httpx.AsyncClient, error: httpx.HTTPError) -> ChatFailed:
    reason = str(error) or type(error).__name__
    return ChatFailed(f"no answer from {client.base_url} ({reason}); is `segue serve` running there? --url names another place")
