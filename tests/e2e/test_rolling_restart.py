"""Every process of a mesh is restarted by SIGTERM, half of them at once, under load, and no request fails."""

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
import pytest

from tests.e2e.http_streams import Stream, metric, text_of
from tests.e2e.real_mesh import RealMesh, make_mesh
from tests.servers import RunningServer

pytestmark = [pytest.mark.servers, pytest.mark.model, pytest.mark.timeout(240)]
SYNTHETIC = ("--engine", "synthetic", "--kv-cache-memory", "64MiB", "--synthetic-step-s", "0.02")
CLIENTS = 4
CHOICES = [(f"the song number {number}", tokens) for number in range(2) for tokens in (5, 60, 200)]


@dataclass
class Load:
    """Clients that ask without a pause. One that cannot connect, or is told to come again, asks the other gateway."""

    urls: list[str]
    client: httpx.AsyncClient
    ended: list[Stream] = field(default_factory=list)
    tried_again: Counter[str] = field(default_factory=Counter)
    stopping: bool = False

    async def run(self, seed: int) -> None:
        rng = random.Random(seed)
        for turn in itertools.count(seed):
            if self.stopping:
                return
            prompt, tokens = rng.choice(CHOICES)
            self.ended.append(await self._one(turn, prompt, tokens))

    async def more(self, count: int) -> None:
        """Wait until so many further streams have ended."""
        before = len(self.ended)
        while len(self.ended) < before + count:
            await asyncio.sleep(0.05)

    async def _one(self, turn: int, prompt: str, tokens: int) -> Stream:
        for attempt in range(4):
            stream = Stream(self.urls[(turn + attempt) % len(self.urls)], prompt, tokens)
            await stream.run(self.client)
            if stream.error is None or stream.text:
                return stream
            self.tried_again[stream.error] += 1
            if not stream.error.startswith("ConnectError"):
                return stream
        return stream


@asynccontextmanager
async def loaded(mesh: RealMesh) -> AsyncIterator[Load]:
    async with httpx.AsyncClient() as client, asyncio.TaskGroup() as group:
        load = Load(list(mesh.gateways.values()), client)
        clients = [group.create_task(load.run(seed)) for seed in range(CLIENTS)]
        try:
            yield load
        finally:
            load.stopping = True
            await asyncio.wait(clients)


async def test_a_rolling_restart_under_load_fails_nothing(nats_server: RunningServer, valkey_server: RunningServer) -> None:
    mesh = make_mesh(nats_server.url, valkey_server.url)
    try:
        for name, role in (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode"), ("d1", "decode")):
            mesh.start_worker(name, role, *SYNTHETIC)
        for name in ("g0", "g1"):
            mesh.start_gateway(name)
        await mesh.until_served()
        async with loaded(mesh) as load:
            await load.more(CLIENTS)
            for half in (("p0", "d0", "g0"), ("p1", "d1", "g1")):
                await asyncio.gather(*map(mesh.restart, half))
                await mesh.until_served()
                await load.more(CLIENTS)
        async with httpx.AsyncClient() as client:
            url = mesh.gateways["g0"]
            assert await metric(client, url, 'segue_mesh_events_total{kind="workers_lost"}') == 0, "a farewell is no loss"
            texts = await asyncio.gather(*(text_of(client, url, *choice) for choice in CHOICES))
        expected = dict(zip(CHOICES, texts, strict=True))
        for stream in load.ended:
            stream.check(expected[stream.prompt, stream.tokens])
        assert set(load.tried_again) <= {error for error in load.tried_again if error.startswith("ConnectError")}
    finally:
        mesh.stop()
