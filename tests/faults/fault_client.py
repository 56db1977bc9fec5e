"""A client that loses nothing: it streams, resumes once where its connection breaks, and repeats its POST where it had no answer.

What it records is what a user sees: the events, when they came, the usage, and how often it had to resume.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

MODEL = "SmolLM2-135M-Instruct"
PATIENCE_S = 60.0
SILENT_S = 4.0
"""A gateway sends a comment each second: one that says nothing for this long is taken for dead, and left."""
RETRY_S = 0.1


@dataclass
class Record:
    """One request as its client saw it. `events` are the data of the stream without what differs from run to run."""

    kind: str
    path: str
    body: dict[str, Any]
    events: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    started: float = 0.0
    error: str | None = None
    done: bool = False
    resumed: int = 0
    refused: int = 0
    moved: int = 0

    def by_choice(self) -> dict[int | None, list[str]]:
        """The events of each choice in their order (None: the usage); how choices interleave is nobody's promise."""
        found: dict[int | None, list[str]] = {}
        for event in self.events:
            choices = json.loads(event)["choices"]
            found.setdefault(choices[0]["index"] if choices else None, []).append(event)
        return found

    @property
    def longest_silence_s(self) -> float:
        """Between two events; the wait for the first one is not among them."""
        return max((later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)), default=0.0)

    @property
    def first_event_s(self) -> float:
        return self.times[0] - self.started if self.times else float("inf")


def requests(nonce: str, *, tokens: int = 48, long_prompts: bool = True) -> list[Record]:
    """The mix: greedy, seeded, log-probabilities, a stop string, two choices, a long prompt, chat."""
    base = {"model": MODEL, "max_tokens": tokens, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    words = " ".join(f"word{i} of {nonce}" for i in range(60 if long_prompts else 8))

    def completion(kind: str, **changes: Any) -> Record:
        return Record(kind, "/v1/completions", {**base, "prompt": f"{kind} {nonce}:", **changes})

    chat = {**base, "messages": [{"role": "user", "content": f"Tell me of {nonce}."}], "seed": 3, "temperature": 1.0}
    return [
        completion("greedy", temperature=0),
        completion("seeded", temperature=0.9, top_p=0.9, seed=11),
        completion("logprobs", temperature=0, logprobs=2),
        completion("stop", temperature=0, stop=["e", "qq"]),
        completion("two choices", temperature=0.8, seed=5, n=2),
        completion("long prompt", prompt=words, temperature=0),
        completion("short", temperature=0, max_tokens=2),
        Record("chat", "/v1/chat/completions", chat),
    ]


async def run(record: Record, urls: Sequence[str]) -> Record:
    """Stream a request to its end. `urls` are gateways; each break turns to the next one."""
    key, turn, request_id = secrets.token_hex(8), 0, ""
    last_id = ""
    record.started = time.monotonic()
    deadline = record.started + PATIENCE_S
    async with httpx.AsyncClient(timeout=httpx.Timeout(SILENT_S)) as client:
        while not record.done and record.error is None:
            if time.monotonic() > deadline:
                record.error = "the client's patience ended"
                break
            url = urls[turn % len(urls)]
            headers = {"x-segue-resume": "1", "Idempotency-Key": key}
            try:
                if request_id:
                    record.resumed += 1
                    resume = {"Last-Event-ID": last_id} if last_id else {}
                    opened = client.stream("GET", f"{url}/v1/streams/{request_id}", headers=resume)
                else:
                    opened = client.stream("POST", url + record.path, json=record.body, headers=headers)
                async with opened as answer:
                    if answer.status_code in (409, 429, 503):
                        record.refused += 1
                        await answer.aread()
                        await asyncio.sleep(min(1.0, float(answer.headers.get("retry-after", RETRY_S))))
                        turn += 1
                        continue
                    if answer.status_code != 200:
                        record.error = f"{answer.status_code} {(await answer.aread()).decode()[:300]}"
                        break
                    request_id = answer.headers.get("x-segue-request-id", "")
                    async for event_id, data in _events(answer):
                        last_id = event_id or last_id
                        if not _take(record, data):
                            break
            except (httpx.TransportError, httpx.StreamError):
                await asyncio.sleep(RETRY_S)
            if not record.done:
                turn += 1
    return record


async def _events(answer: httpx.Response) -> AsyncIterator[tuple[str, str]]:
    event_id = data = ""
    async for line in answer.aiter_lines():
        if line.startswith("id:"):
            event_id = line[3:].strip()
        elif line.startswith("data:"):
            data = line[5:].strip()
        elif not line and data:
            yield event_id, data
            event_id = data = ""


def _take(record: Record, data: str) -> bool:
    """False: the stream ends here, though not the answer: another gateway goes on with it, whatever this one still says."""
    if data == "[DONE]":
        record.done = True
        return True
    event = json.loads(data)
    if "error" in event:
        if event["error"].get("code") == "moved":
            record.moved += 1
            return False
        record.error = str(event["error"])
        return True
    for name in ("id", "created"):
        event.pop(name, None)
    record.events.append(json.dumps(event, sort_keys=True))
    record.times.append(time.monotonic())
    return True
