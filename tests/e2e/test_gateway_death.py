"""A gateway is killed, or frozen, in the middle of streams: after one resume, or one repeat with the same Idempotency-Key, at
another gateway the client has the bytes that it would have had."""

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import pytest
from redis.asyncio import Redis

from tests.e2e.http_streams import body_of, metric
from tests.e2e.real_mesh import RealMesh, make_mesh
from tests.e2e.serving import serving
from tests.servers import RunningServer

pytestmark = [pytest.mark.servers, pytest.mark.model, pytest.mark.timeout(240)]
SYNTHETIC = ("--engine", "synthetic", "--kv-cache-memory", "64MiB", "--synthetic-step-s", "0.02")
TOKENS = 120
RESUMABLE = {"x-segue-resume": "1"}
KEYED = {"idempotency-key": "one"}
PROMPTS = ("one two three", "a quick brown fox", "to be or not to be")


@dataclass
class TwoGateways:
    mesh: RealMesh
    client: httpx.AsyncClient
    first: str
    second: str

    async def whole(self, url: str, prompt: str, headers: Mapping[str, str]) -> str:
        answer = await self.client.post(f"{url}/v1/completions", json=streamed(prompt), headers=headers)
        assert answer.status_code == 200, answer.text
        return bare(answer.text)

    async def begin(self, prompt: str, headers: Mapping[str, str], until: asyncio.Event) -> tuple[str, str]:
        """Read a stream of the first gateway until it dies. Returns its id, and the whole events that came."""
        text, request_id = "", ""
        try:
            async with self.client.stream("POST", f"{self.first}/v1/completions", json=streamed(prompt), headers=headers) as answer:
                request_id = answer.headers["x-segue-request-id"]
                async for piece in answer.aiter_text():
                    text += piece
                    if text.count("data: ") >= 12:
                        until.set()
        except httpx.HTTPError:
            pass
        return request_id, bare(text.rpartition("\n\n")[0] + "\n\n")

    async def resume(self, request_id: str, begun: str) -> str:
        last = re.findall(r"^id: (\S+)$", begun, re.MULTILINE)[-1]
        answer = await self.client.get(f"{self.second}/v1/streams/{request_id}", headers={"last-event-id": last})
        assert answer.status_code == 200, answer.text
        return bare(answer.text)

    async def nothing_runs(self) -> None:
        async with asyncio.timeout(20):
            while await metric(self.client, self.second, "segue_mesh_requests"):
                await asyncio.sleep(0.1)


def streamed(prompt: str) -> dict[str, object]:
    return body_of(prompt, TOKENS, stream=True, stream_options={"include_usage": True})


def bare(stream: str) -> str:
    """Without pings and what names the request."""
    return re.sub(r': ping\n\n|"id":"[^"]+"|"created":\d+', "", stream)


@asynccontextmanager
async def two_gateways(nats: RunningServer, valkey: RunningServer) -> AsyncIterator[TwoGateways]:
    mesh = make_mesh(nats.url, valkey.url)
    try:
        mesh.start_worker("p", "prefill", *SYNTHETIC)
        mesh.start_worker("d", "decode", *SYNTHETIC)
        first, second = mesh.start_gateway("g0"), mesh.start_gateway("g1")
        await mesh.until_served()
        async with httpx.AsyncClient(timeout=60.0, trust_env=False) as client:
            yield TwoGateways(mesh, client, first, second)
    finally:
        mesh.stop()


async def test_streams_of_a_killed_gateway_are_resumed_or_repeated_at_another(
    nats_server: RunningServer, valkey_server: RunningServer
) -> None:
    async with two_gateways(nats_server, valkey_server) as here:
        expected = {prompt: await here.whole(here.second, prompt, {}) for prompt in PROMPTS}
        asked = [(PROMPTS[0], RESUMABLE), (PROMPTS[1], {}), (PROMPTS[2], KEYED)]
        under_way = [asyncio.Event() for _ in asked]
        readers = [asyncio.ensure_future(here.begin(*asking, until)) for asking, until in zip(asked, under_way, strict=True)]
        await asyncio.gather(*(event.wait() for event in under_way))
        here.mesh.processes["g0"].kill()
        streams = await asyncio.gather(*readers)
        for (prompt, _), (request_id, begun) in zip(asked[:2], streams[:2], strict=True):
            assert 12 <= begun.count("data: ") < TOKENS
            assert begun + await here.resume(request_id, begun) == expected[prompt]
        repeats = [here.whole(here.second, PROMPTS[2], KEYED) for _ in range(3)]
        assert set(await asyncio.gather(*repeats)) == {expected[PROMPTS[2]]}
        assert await metric(here.client, here.second, 'segue_mesh_events_total{kind="adopted"}') >= 2
        assert await metric(here.client, here.second, 'segue_mesh_events_total{kind="workers_lost"}') == 0


async def test_a_frozen_gateway_that_wakes_up_loses_cleanly(nats_server: RunningServer, valkey_server: RunningServer) -> None:
    async with two_gateways(nats_server, valkey_server) as here:
        expected = await here.whole(here.second, PROMPTS[0], {})
        frozen = here.mesh.processes["g0"].pid
        under_way = asyncio.Event()
        reader = asyncio.ensure_future(here.begin(PROMPTS[0], RESUMABLE, under_way))
        await under_way.wait()
        os.kill(frozen, signal.SIGSTOP)
        answer = await here.client.get(f"{here.second}/v1/streams/{await stream_id(here)}")
        assert bare(answer.text) == expected
        os.kill(frozen, signal.SIGCONT)
        request_id, begun = await reader
        assert request_id
        assert begun.startswith(expected[:200])
        assert await metric(here.client, here.first, 'segue_mesh_events_total{kind="dropped"}') <= 1
        assert await here.whole(here.first, PROMPTS[0], {}) == expected


async def stream_id(here: TwoGateways) -> str:
    """The one request that runs, as the store knows it."""
    async with Redis.from_url(here.mesh.redis_url) as redis:
        keys = [key async for key in redis.scan_iter(f"segue:v1:{here.mesh.name}:request:*")]
        [running] = [key for key in keys if await redis.hget(key, "state") == b"running"]
    return str(running.decode().rpartition(":")[2])


@pytest.mark.slow
async def test_behind_one_port_a_killed_gateway_is_resumed_at_whichever_takes_the_connection() -> None:
    flags = ("--both", "1", "--gateways", "2", "--engine", "synthetic", "--kv-cache-memory", "64MiB", "--synthetic-step-s", "0.02")
    async with serving(*flags) as running, httpx.AsyncClient(base_url=running.url, timeout=60.0, trust_env=False) as client:
        await running.until("ready at")
        gateways = [running.child(f"gateway-{index}.toml") for index in range(2)]
        expected = bare((await client.post("/v1/completions", json=streamed(PROMPTS[0]))).text)
        begun, request_id = "", ""
        try:
            async with client.stream("POST", "/v1/completions", json=streamed(PROMPTS[0]), headers=RESUMABLE) as answer:
                request_id = answer.headers["x-segue-request-id"]
                async for piece in answer.aiter_text():
                    begun += piece
                    if begun.count("data: ") >= 12 and gateways:
                        for pid in gateways:
                            os.kill(pid, signal.SIGKILL)
                        gateways.clear()
        except httpx.HTTPError:
            pass
        begun = bare(begun.rpartition("\n\n")[0] + "\n\n")
        last = re.findall(r"^id: (\S+)$", begun, re.MULTILINE)[-1]
        rest = await client.get(f"/v1/streams/{request_id}", headers={"last-event-id": last})
        assert rest.status_code == 200, rest.text
        assert begun + bare(rest.text) == expected
