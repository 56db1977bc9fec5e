"""Objectives over HTTP: what a client may ask for, what it is told when that cannot be had, and what its account says afterwards."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect

from common.engine.synthetic import StepTimes
from common.runtime.settings_classes import request_classes
from services.gateway.goodput_metrics import show_goodput
from tests.gateway_server import RunningGateway, chat, eventually, gateway
from tests.gateway_twin import tiny_card
from tests.mesh_in_memory import running_mesh

CLASSES = request_classes(["quick:ttft=0.001:tpot=60000:late=refuse", "calm:ttft=60000:tpot=60000"], ttft_s=None, tpot_s=None)
KEYS = ("open", "hurried class=quick", "patient class=calm")


@asynccontextmanager
async def served() -> AsyncIterator[RunningGateway]:
    """No worker is so quick that a whole prompt takes a microsecond: what is `quick` is late for sure."""
    async with running_mesh() as mesh:
        for name, role in (("p0", "prefill"), ("d0", "decode")):
            await mesh.start_worker(name, role, times=StepTimes(fixed=0.001), model=tiny_card(max_model_len=256))  # type: ignore[arg-type]
        client = await mesh.start_gateway()
        await mesh.settled(client)
        async with gateway(client, api_keys=KEYS, classes=CLASSES) as running:  # type: ignore[arg-type]
            show_goodput(running.metrics, client, [each.name for each in CLASSES])
            yield running


async def post(running: RunningGateway, key: str, *, stream: bool = False, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    body = chat("hello", max_tokens=4, ignore_eos=True, stream=stream)
    return await running.client.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}", **named})


async def account(running: RunningGateway, answer: httpx.Response, key: str) -> dict[str, Any]:
    """Of an ended request."""
    async with asyncio.timeout(10):
        while True:
            path = f"/v1/requests/{answer.headers['x-segue-request-id']}"
            shown = (await running.client.get(path, headers={"authorization": f"Bearer {key}"})).json()
            if shown["state"] != "running":
                assert shown["account"] is not None
                return dict(shown["account"])
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
async def test_what_cannot_be_in_time_is_told_so_at_once_where_its_class_says_so(stream: bool) -> None:
    async with served() as running:
        refused = await post(running, "hurried", stream=stream)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "overloaded"
        assert 'segue_goodput_requests_total{class="quick",outcome="refused"} 1' in running.metrics.exposition()
        assert (await post(running, "open", stream=stream)).status_code == 200, "nobody promised anything: it is served"


async def test_a_request_may_be_more_patient_than_its_class_and_its_account_says_what_it_got() -> None:
    async with served() as running:
        answer = await post(running, "hurried", x_slo_ttft_ms="60000")
        assert answer.status_code == 200
        had = await account(running, answer, "hurried")
        assert had["request_class"] == "quick"
        assert had["placement"] == "split"
        assert had["ttft_s"] == pytest.approx(60.0)
        assert had["predicted"]["ttft_s"] > 0.0
        assert had["had"]["ttft_s"] > 0.0
        assert had["best_effort"] is False
        await eventually(lambda: 'segue_goodput_requests_total{class="quick",outcome="good"} 1' in running.metrics.exposition())


async def test_without_objectives_they_follow_from_the_meshs_own_speed() -> None:
    async with served() as running:
        had = await account(running, await post(running, "open"), "open")
        assert had["request_class"] == "default"
        assert had["ttft_s"] > 0.1
        assert had["tpot_s"] > 0.0


async def test_nobody_gets_more_than_the_class_of_their_key_allows() -> None:
    async with served() as running:
        for headers in ({"x_slo_ttft_ms": "59999"}, {"x_slo_tpot_ms": "1"}, {"x_slo_class": "quick"}):
            answer = await post(running, "patient", **headers)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == next(iter(headers)).replace("_", "-")
        assert (await post(running, "patient", x_slo_ttft_ms="61000", x_slo_class="calm")).status_code == 200
        assert (await post(running, "open", x_slo_class="quick")).status_code == 429


async def test_a_websocket_says_it_in_the_frame() -> None:
    async with served() as running, connect(running.websocket_url, additional_headers={"authorization": "Bearer open"}) as socket:
        frame = {"type": "generate", "id": "a", **chat("hello", max_tokens=2), "metadata": {"slo_class": "quick"}}
        await socket.send(json.dumps(frame))
        answer = json.loads(await socket.recv())
        assert (answer["type"], answer["error"]["code"]) == ("error", "overloaded")
