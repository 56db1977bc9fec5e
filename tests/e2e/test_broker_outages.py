"""NATS and the store die, freeze, fill up and come back empty, under a real gateway and real workers (synthetic engine).

Running streams finish as if nothing had happened; what is new is refused with 503 and Retry-After; afterwards all is as before,
and nobody was taken for lost.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import pytest
from redis.asyncio import Redis

from tests.e2e.http_streams import Stream, body_of, metric, text_of
from tests.e2e.real_mesh import RealMesh, make_mesh
from tests.servers import RunningServer, free_port

pytestmark = [pytest.mark.servers, pytest.mark.model, pytest.mark.timeout(240)]
STEP_S = 0.02
SYNTHETIC = ("--engine", "synthetic", "--kv-cache-memory", "64MiB", "--synthetic-step-s")
PROMPTS = ("one two three", "a quick brown fox", "to be or not to be")


@dataclass
class Served:
    """A gateway above a prefill and a decode worker; `decode` is where the decode worker shows its metrics."""

    mesh: RealMesh
    url: str
    decode: str
    client: httpx.AsyncClient

    async def begin(self, tokens: int) -> tuple[list[Stream], list[asyncio.Task[Stream]]]:
        """Streams that have all begun."""
        streams = [Stream(self.url, prompt, tokens) for prompt in PROMPTS]
        tasks = [asyncio.ensure_future(stream.run(self.client)) for stream in streams]
        for stream in streams:
            await stream.began.wait()
            assert stream.error is None, stream.error
        return streams, tasks

    async def refused(self, code: str) -> int:
        """A new request is turned away in bounded time. Returns the Retry-After."""
        answer = await self.client.post(f"{self.url}/v1/completions", json=body_of("new", 2), timeout=30.0)
        assert answer.status_code == 503, answer.text
        assert answer.json()["error"]["code"] == code
        return int(answer.headers["retry-after"])

    async def admits_again(self) -> None:
        """After a while; until then it says 503, never anything else."""
        while True:
            answer = await self.client.post(f"{self.url}/v1/completions", json=body_of("new", 2), timeout=30.0)
            if answer.status_code == 200:
                return
            assert answer.status_code == 503, answer.text
            await asyncio.sleep(0.2)

    async def all_undisturbed(self, streams: Sequence[Stream], url: str) -> None:
        """Each has the text that it has when it is asked for again, now that all is well."""
        expected = await asyncio.gather(*(text_of(self.client, url, stream.prompt, stream.tokens) for stream in streams))
        for stream, text in zip(streams, expected, strict=True):
            stream.check(text)

    async def nobody_was_lost(self) -> None:
        for kind in ("workers_lost", "unknown", "dispatch_stale"):
            assert await metric(self.client, self.url, f'segue_mesh_events_total{{kind="{kind}"}}') == 0, kind

    async def tokens_made(self) -> float:
        return await metric(self.client, self.decode, "segue_tokens_total")


@asynccontextmanager
async def served(nats: RunningServer, valkey: RunningServer, *, step_s: float = STEP_S) -> AsyncIterator[Served]:
    mesh = make_mesh(nats.url, valkey.url)
    port = free_port()
    try:
        mesh.start_worker("p", "prefill", *SYNTHETIC, str(step_s))
        mesh.start_worker("d", "decode", *SYNTHETIC, str(step_s), "--status-port", str(port))
        url = mesh.start_gateway("g", "--sse-keepalive", "1")
        await mesh.until_served()
        async with httpx.AsyncClient() as client:
            yield Served(mesh, url, f"http://127.0.0.1:{port}", client)
    finally:
        mesh.stop()


@pytest.mark.parametrize("away_s", [1.0, 6.0, pytest.param(30.0, marks=pytest.mark.slow)])
async def test_nats_dies_and_comes_back(away_s: float, nats_server: RunningServer, valkey_server: RunningServer) -> None:
    step_s = max(STEP_S, away_s / 400)
    async with served(nats_server, valkey_server, step_s=step_s) as mesh:
        tokens = round((away_s + 2.0) / step_s)
        streams, running = await mesh.begin(tokens)
        await nats_server.kill()
        made = await mesh.tokens_made()
        assert await mesh.refused("broker_unavailable") >= 1
        await asyncio.sleep(away_s)
        assert await mesh.tokens_made() > made, "decodes went on"
        assert not any(task.done() for task in running)
        if away_s > 3.0:
            assert all(stream.pings for stream in streams), "silence was filled"
            assert await mesh.refused("broker_unavailable") > 1, "the wait follows from the outage"
        await nats_server.start()
        await mesh.admits_again()
        await mesh.all_undisturbed(await asyncio.gather(*running), mesh.url)
        await mesh.nobody_was_lost()


async def test_nats_freezes(nats_server: RunningServer, valkey_server: RunningServer) -> None:
    async with served(nats_server, valkey_server) as mesh:
        _, running = await mesh.begin(100)
        nats_server.freeze()
        await mesh.refused("broker_unavailable")
        nats_server.thaw()
        await mesh.admits_again()
        await mesh.all_undisturbed(await asyncio.gather(*running), mesh.url)
        await mesh.nobody_was_lost()


async def test_the_store_is_full_freezes_dies_and_comes_back_empty(nats_server: RunningServer, valkey_server: RunningServer) -> None:
    async with served(nats_server, valkey_server) as mesh:
        _, running = await mesh.begin(100)
        async with Redis.from_url(valkey_server.url) as store:
            await store.config_set("maxmemory-policy", "noeviction")
            await store.config_set("maxmemory", "1")
            assert await mesh.refused("state_store_unavailable") >= 1
            ended = await asyncio.gather(*running)
            await store.config_set("maxmemory", "0")
        await mesh.admits_again()
        await mesh.all_undisturbed(ended, mesh.url)

        _, running = await mesh.begin(100)
        valkey_server.freeze()
        assert await mesh.refused("state_store_unavailable") >= 1
        ended = await asyncio.gather(*running)
        valkey_server.thaw()
        await mesh.admits_again()
        await mesh.all_undisturbed(ended, mesh.url)

        _, running = await mesh.begin(150)
        await valkey_server.kill()
        assert await mesh.refused("state_store_unavailable") >= 1
        await valkey_server.start()
        await mesh.admits_again()
        second = mesh.mesh.start_gateway("second")
        await mesh.mesh.until_served()
        await mesh.all_undisturbed(await asyncio.gather(*running), second)
        await mesh.nobody_was_lost()
