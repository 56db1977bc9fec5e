"""`GET /v1/requests/{id}`: moments of an ended request, at any gateway, for whoever asked for it and nobody else."""

import asyncio
from typing import Any

import httpx

from tests.gateway_server import RunningGateway
from tests.integration.test_resume_http import ALICE, MALLORY, body, two
from tools.bench_load.stages import STAGES


async def timeline(running: RunningGateway, request_id: str, headers: dict[str, str] = ALICE) -> httpx.Response:
    return await running.client.get(f"/v1/requests/{request_id}", headers=headers)


async def test_an_ended_request_says_where_its_time_went_and_only_to_its_tenant() -> None:
    async with two() as here:
        answer = await here.first.client.post("/v1/chat/completions", json=body(), headers=ALICE)
        request_id = answer.headers["x-segue-request-id"]
        async with asyncio.timeout(10):
            await here.ended(request_id)
        for running in (here.first, here.second):
            shown: dict[str, Any] = (await timeline(running, request_id)).json()
            assert shown["id"] == request_id
            assert (shown["state"], shown["worker"], shown["decode_worker"]) == ("ended", "p0", "d0")
            moments = [shown["seconds"][stage.ends] for stage in STAGES]
            assert 0.0 <= moments[0] <= moments[1]
            assert moments == sorted(moments), "the five stages follow each other"
        assert (await timeline(here.first, request_id, MALLORY)).status_code == 404
        assert (await timeline(here.first, request_id, {})).status_code == 401
        assert (await timeline(here.first, "chatcmpl-nobody")).status_code == 404
