"""Asks a Segue gateway, after a point, for the timelines of its requests; other servers have none and are not asked."""

from collections.abc import Sequence
from dataclasses import replace

import msgspec

from tools.bench_load.http_client import HttpClient
from tools.bench_load.request_result import RequestResult


class _Timeline(msgspec.Struct):
    seconds: dict[str, float] = {}


async def with_timelines(results: Sequence[RequestResult], client: HttpClient) -> list[RequestResult]:
    """One after another: nothing is measured meanwhile. A request without a timeline stays as it is; where the first that was
    asked for has none, the server is not one that keeps them, and it is left at that."""
    found = list(results)
    for place, one in enumerate(results):
        if one.request_id is None or not one.is_complete:
            continue
        answer = await client.get(f"/v1/requests/{one.request_id}")
        if answer.status != 200:
            if answer.status == 404 and not any(result.stages_s for result in found):
                break
            continue
        try:
            seconds = msgspec.json.decode(bytes(answer.body), type=_Timeline).seconds
        except msgspec.DecodeError:
            break
        found[place] = replace(one, stages_s=seconds)
    return found
