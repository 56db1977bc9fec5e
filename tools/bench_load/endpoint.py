"""The server that is measured: where it is, and what a request to it looks like in bytes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

import orjson

from tools.bench_load.bench_refused import BenchRefused

Api = Literal["chat", "completions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """`prefix` is what stands before `/v1` in its paths. `extra` fields go into every body. The key is never shown."""

    host: str
    port: int
    is_tls: bool
    prefix: str
    api: Api
    model: str = ""
    api_key: str | None = field(default=None, repr=False)
    extra: Mapping[str, object] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.host}:{self.port}{self.prefix}"

    def get(self, path: str) -> bytes:
        return self._head("GET", path, "application/json") + b"\r\n"

    def ask(self, prompt: str | list[int], output_tokens: int) -> bytes:
        """A whole request, greedy and of exactly that many tokens where the server can do so (`ignore_eos`)."""
        asked = {"messages": [{"role": "user", "content": prompt}]} if self.api == "chat" else {"prompt": prompt}
        path = "/v1/chat/completions" if self.api == "chat" else "/v1/completions"
        body = orjson.dumps(
            {
                "model": self.model,
                **asked,
                "max_tokens": output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                **self.extra,
            }
        )
        lengths = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        return self._head("POST", path, "text/event-stream") + lengths + body

    def _head(self, method: str, path: str, accept: str) -> bytes:
        key = f"Authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        return (
            f"{method} {self.prefix}{path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n{key}Accept: {accept}\r\nConnection: close\r\n"
        ).encode()


def parse_endpoint(url: str, *, api: Api, model: str, api_key: str | None, extra: Mapping[str, object]) -> Endpoint:
    """`http://host:port`, with or without `/v1`."""
    try:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise BenchRefused(f"endpoint: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise BenchRefused("the endpoint is a URL such as http://127.0.0.1:8000; a key belongs into --api-key-file")
    return Endpoint(
        host=parts.hostname,
        port=port,
        is_tls=parts.scheme == "https",
        prefix=parts.path.rstrip("/").removesuffix("/v1"),
        api=api,
        model=model,
        api_key=api_key,
        extra=extra,
    )
