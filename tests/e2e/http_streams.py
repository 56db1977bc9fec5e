"""Completions over HTTP as a client sees them, for tests that look at what survives: text, usage, pings, the error."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import httpx

MODEL = "SmolLM2-135M-Instruct"
TIMEOUT_S = 120.0


def body_of(prompt: str, tokens: int, **changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **changes}


@dataclass
class Stream:
    """One streamed completion; `began` is set with its first text. `run` raises nothing: `error` says what went wrong."""

    url: str
    prompt: str
    tokens: int
    text: str = ""
    usage: dict[str, int] | None = None
    pings: int = 0
    done: bool = False
    error: str | None = None
    began: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, client: httpx.AsyncClient) -> "Stream":
        body = body_of(self.prompt, self.tokens, stream=True, stream_options={"include_usage": True})
        try:
            async with client.stream("POST", f"{self.url}/v1/completions", json=body, timeout=TIMEOUT_S) as answer:
                if answer.status_code != 200:
                    self.error = f"{answer.status_code} {(await answer.aread()).decode()}"
                else:
                    async for line in answer.aiter_lines():
                        self._take(line)
        except httpx.HTTPError as error:
            self.error = repr(error)
        finally:
            self.began.set()
        return self

    def _take(self, line: str) -> None:
        if line.startswith(":"):
            self.pings += 1
        elif line == "data: [DONE]":
            self.done = True
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                self.error = str(event["error"])
                return
            self.text += "".join(choice["text"] for choice in event["choices"])
            self.usage = event.get("usage") or self.usage
            self.began.set()

    def check(self, expected: str) -> None:
        """It ended well, with the text that an undisturbed one has, and usage of all of it."""
        assert self.error is None, self.error
        assert self.done
        assert self.text == expected
        assert self.usage is not None
        assert self.usage["completion_tokens"] == self.tokens


async def text_of(client: httpx.AsyncClient, url: str, prompt: str, tokens: int) -> str:
    answer = await client.post(f"{url}/v1/completions", json=body_of(prompt, tokens), timeout=TIMEOUT_S)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


async def metric(client: httpx.AsyncClient, url: str, series: str) -> float:
    """The value of one series (name with labels) in what `url`/metrics shows."""
    for line in (await client.get(f"{url}/metrics", timeout=TIMEOUT_S)).text.splitlines():
        name, _, value = line.rpartition(" ")
        if name == series:
            return float(value)
    raise AssertionError(f"{url} shows no {series}")
