"""A gateway on a free loopback port, on top of the in-memory mesh, for the length of a `with` block."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from common.runtime.metrics import Metrics
from services.gateway.http.application import GatewayApplication, build_application
from services.gateway.http.http_settings import HttpSettings
from services.gateway.http.server import listen, serve_http
from tests.gateway_twin import MODEL, TwinMesh


@dataclass
class RunningGateway:
    mesh: TwinMesh
    application: GatewayApplication
    metrics: Metrics
    stop: asyncio.Event
    host: str
    port: int
    client: httpx.AsyncClient

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def websocket_url(self) -> str:
        return f"ws://{self.host}:{self.port}/v1/stream"


@asynccontextmanager
async def gateway(mesh: TwinMesh | None = None, **settings: object) -> AsyncIterator[RunningGateway]:
    mesh = mesh or TwinMesh()
    listening = listen("127.0.0.1", 0)
    host, port = listening.getsockname()[:2]
    chosen = HttpSettings(**{"drain_timeout_s": 1.0, **settings})  # type: ignore[arg-type]
    metrics, stop = Metrics(), asyncio.Event()
    application = build_application(mesh, chosen, metrics)
    async with asyncio.TaskGroup() as group:
        group.create_task(serve_http(application, chosen, sockets=[listening], stop=stop))
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=30, trust_env=False) as client:
            yield RunningGateway(mesh, application, metrics, stop, host, port, client)
        stop.set()


def chat(content: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "seed": 0, "max_tokens": 20, **fields}


def completion(prompt: object = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "seed": 0, "max_tokens": 20, **fields}


@dataclass
class SseEvent:
    id: str
    data: dict[str, Any]


def parse_sse(body: str) -> tuple[list[SseEvent], bool]:
    """The events of a whole stream, and whether it ended with [DONE]."""
    events, done = [], False
    for block in body.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
        if fields.get("data") == "[DONE]":
            done = True
        elif fields:
            assert not done, "nothing comes after [DONE]"
            events.append(SseEvent(fields.get("id", ""), json.loads(fields["data"])))
    return events, done


async def eventually(holds: Callable[[], bool]) -> None:
    """Wait for what another task or process is about to do."""
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.005)


async def quiet(mesh: TwinMesh) -> None:
    """Wait until nothing runs in the mesh."""
    await eventually(lambda: not mesh.open)


async def shown(running: RunningGateway, line: str) -> None:
    """Wait until the metrics show it: a stream's end is counted just after its last event was sent."""
    await eventually(lambda: line in running.metrics.exposition())
