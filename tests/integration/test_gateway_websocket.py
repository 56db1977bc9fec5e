"""`/v1/stream` over real websockets."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import websockets
from websockets.asyncio.client import ClientConnection

from tests.gateway_server import RunningGateway, chat, completion, eventually, gateway, quiet
from tests.gateway_twin import Script, TwinMesh, saying_tokens, tiny_card, tiny_tokenizer


@asynccontextmanager
async def connected(running: RunningGateway, **options: Any) -> AsyncIterator[ClientConnection]:
    async with websockets.connect(running.websocket_url, proxy=None, **options) as connection:
        yield connection


async def say(connection: ClientConnection, kind: str, client_id: str | None = None, **fields: Any) -> None:
    await connection.send(json.dumps({"type": kind, **({} if client_id is None else {"id": client_id}), **fields}))


async def hear(connection: ClientConnection) -> dict[str, Any]:
    """The next frame but `accepted`."""
    async with asyncio.timeout(5):
        while True:
            frame: dict[str, Any] = json.loads(await connection.recv())
            if frame["type"] != "accepted":
                return frame


async def hear_all(connection: ClientConnection, ends: int) -> list[dict[str, Any]]:
    frames: list[dict[str, Any]] = []
    while sum(frame["type"] in ("done", "error") for frame in frames) < ends:
        frames.append(await hear(connection))
    return frames


def text_of(frames: list[dict[str, Any]], client_id: str, choice: int = 0) -> str:
    return "".join(f["text"] for f in frames if f["type"] == "token" and (f["id"], f["choice"]) == (client_id, choice))


def said(tokens: int, seed: int = 0) -> str:
    return str(tiny_tokenizer().decode([saying_tokens(seed)[index % len(saying_tokens(seed))] for index in range(tokens)]))


async def test_several_requests_at_once_on_one_connection() -> None:
    async with gateway() as running, connected(running) as connection:
        await say(connection, "generate", "a", **chat(seed=0, max_tokens=30))
        await say(connection, "generate", "b", **completion("x", seed=1, n=2, max_tokens=40))
        await say(connection, "generate", "c", **chat(seed=2, stop="STOP", max_tokens=300))
        frames = await hear_all(connection, 3)
        assert text_of(frames, "a") == said(30)
        assert [text_of(frames, "b", choice) for choice in (0, 1)] == [said(40, 1), said(40, 2)]
        assert text_of(frames, "c") == "one two three four five six seven "
        done = {frame["id"]: frame for frame in frames if frame["type"] == "done"}
        assert done["b"]["choices"] == [{"choice": 0, "finish_reason": "length"}, {"choice": 1, "finish_reason": "length"}]
        assert done["b"]["usage"]["completion_tokens"] == 80
        assert done["c"]["choices"] == [{"choice": 0, "finish_reason": "stop"}]
        indices = [frame["index"] for frame in frames if frame["type"] == "token" and frame["id"] == "a"]
        assert indices == sorted(set(indices))
        assert indices[-1] == 29
        await quiet(running.mesh)


async def test_cancel_ends_one_request_and_tells_it() -> None:
    async with gateway(TwinMesh(script=Script(hold_after=3))) as running, connected(running) as connection:
        await say(connection, "generate", "stays", **chat())
        await say(connection, "generate", "goes", **chat(n=2))
        await eventually(lambda: running.mesh.made == 9)
        await say(connection, "cancel", "goes")
        await say(connection, "cancel", "goes")
        await say(connection, "cancel", "unknown")
        frames = await hear_all(connection, 1)
        assert frames[-1]["id"] == "goes"
        assert [choice["finish_reason"] for choice in frames[-1]["choices"]] == ["cancelled", "cancelled"]
        assert frames[-1]["usage"]["completion_tokens"] == 6
        await eventually(lambda: len(running.mesh.open) == 1)
        await say(connection, "generate", "goes", **chat(max_tokens=2))
        assert (await hear_all(connection, 1))[-1]["choices"][0]["finish_reason"] == "length"


async def test_a_generate_and_its_cancel_in_one_packet_still_end_once() -> None:
    gate = asyncio.Event()
    async with gateway(TwinMesh(script=Script(gate=gate))) as running, connected(running) as connection:
        for attempt in range(5):
            await asyncio.gather(say(connection, "generate", str(attempt), **chat()), say(connection, "cancel", str(attempt)))
            frame = await hear(connection)
            assert (frame["type"], frame["id"]) == ("done", str(attempt))
        await quiet(running.mesh)


async def test_a_lost_connection_cancels_all_its_requests() -> None:
    async with gateway(TwinMesh(script=Script(hold_after=3))) as running:
        async with connected(running) as connection:
            for place in range(4):
                await say(connection, "generate", str(place), **chat())
            await eventually(lambda: len(running.mesh.open) == 4)
            connection.transport.abort()
        await quiet(running.mesh)
        assert len(running.mesh.cancelled) == 4


async def test_a_bad_frame_gets_an_error_and_the_connection_stays() -> None:
    async with gateway(websocket_max_requests=2) as running, connected(running) as connection:
        for text, client_id, says in (
            ("{", None, "JSON"),
            ("[]", None, "object"),
            ('{"type":"nonsense","id":"x"}', "x", "nonsense"),
            ('{"type":"generate"}', None, "id"),
            ('{"type":"generate","id":""}', "", "length"),
            ('{"type":"generate","id":"x"}', "x", "either"),
            ('{"type":"generate","id":"x","prompt":"a","messages":[]}', "x", "either"),
            ('{"type":"generate","id":"x","prompt":"a"}', "x", "model"),
            (json.dumps({"type": "generate", "id": "x"} | chat(temperature="hot")), "x", "temperature"),
        ):
            await connection.send(text)
            frame = await hear(connection)
            assert (frame["type"], frame["id"]) == ("error", client_id), frame
            assert says in frame["error"]["message"] + str(frame["error"]["param"])
        await connection.send(b"\x00\x01")
        assert "binary" in (await hear(connection))["error"]["message"]
        await say(connection, "generate", "x", **chat())
        assert (await hear_all(connection, 1))[-1]["type"] == "done"


async def test_ids_in_use_and_too_many_requests() -> None:
    async with gateway(TwinMesh(script=Script(hold_after=0)), websocket_max_requests=2) as running, connected(running) as connection:
        for client_id in ("a", "b"):
            await say(connection, "generate", client_id, **chat())
        await say(connection, "generate", "a", **chat())
        assert "in use" in (await hear(connection))["error"]["message"]
        await say(connection, "generate", "c", **chat())
        assert (await hear(connection))["error"]["code"] == "overloaded"


async def test_failures_are_error_frames() -> None:
    async with gateway(TwinMesh(script=Script(fail_at=2))) as running, connected(running) as connection:
        await say(connection, "generate", "a", **chat())
        frames = await hear_all(connection, 1)
        assert frames[-1]["error"]["code"] == "worker_lost"
        assert text_of(frames, "a") == said(2)
        await quiet(running.mesh)


async def test_keys_by_handshake_or_first_frame() -> None:
    async with gateway(api_keys=("right",), header_timeout_s=0.3) as running:
        async with connected(running, additional_headers={"authorization": "Bearer right"}) as connection:
            await say(connection, "generate", "a", **chat())
            assert (await hear_all(connection, 1))[-1]["type"] == "done"
        with pytest.raises(websockets.InvalidStatus):
            await websockets.connect(running.websocket_url, proxy=None, additional_headers={"authorization": "Bearer wrong"})
        async with connected(running) as connection:
            await say(connection, "auth", api_key="right")
            assert await hear(connection) == {"type": "ready"}
            await say(connection, "generate", "a", **chat())
            assert (await hear_all(connection, 1))[-1]["type"] == "done"
        for first in ({"kind": "auth", "api_key": "wrong"}, {"kind": "generate", "client_id": "a", **chat()}):
            async with connected(running) as connection:
                await say(connection, **first)
                assert (await hear(connection))["error"]["code"] == "invalid_api_key"
                with pytest.raises(websockets.ConnectionClosed):
                    await hear(connection)
        async with connected(running) as connection:
            with pytest.raises(websockets.ConnectionClosed):
                await hear(connection)  # no key came in time
        assert len(running.mesh.requests) == 2


async def test_foreign_pages_and_other_paths_get_no_websocket() -> None:
    async with gateway() as running:
        with pytest.raises(websockets.InvalidStatus):
            await websockets.connect(running.websocket_url, proxy=None, origin=websockets.Origin("http://evil.example"))
        with pytest.raises(websockets.InvalidStatus):
            await websockets.connect(running.websocket_url + "/x", proxy=None)
        async with connected(running, origin=websockets.Origin(running.url)) as connection:
            await say(connection, "generate", "a", **chat())
            assert (await hear_all(connection, 1))[-1]["type"] == "done"


async def test_a_frame_that_is_too_large_ends_the_connection_only() -> None:
    async with gateway(max_body_bytes=10_000) as running:
        async with connected(running) as connection:
            await say(connection, "generate", "a", **chat("x" * 20_000))
            with pytest.raises(websockets.ConnectionClosed) as caught:
                await hear(connection)
            assert caught.value.rcvd is not None
            assert caught.value.rcvd.code == 1009
        assert (await running.client.get("/health")).status_code == 200


async def test_a_slow_reader_holds_up_only_its_own_requests() -> None:
    mesh = TwinMesh(served=(tiny_card(max_model_len=500_000),))
    async with gateway(mesh, slow_reader_timeout_s=0.5) as running:
        slow = await websockets.connect(running.websocket_url, proxy=None, max_queue=1)
        await say(slow, "generate", "a", **chat(max_tokens=400_000))
        async with connected(running) as quick:
            await say(quick, "generate", "b", **chat(max_tokens=500))
            assert text_of(await hear_all(quick, 1), "b") == said(500)
        await quiet(mesh)
        assert mesh.made < 300_000, "the slow reader's tokens waited"
        slow.transport.abort()


async def test_stopping_lets_requests_finish_then_closes() -> None:
    gate = asyncio.Event()
    async with gateway(TwinMesh(script=Script(gate=gate))) as running, connected(running) as connection:
        await say(connection, "generate", "a", **chat())
        await eventually(lambda: len(running.mesh.open) == 1)
        running.stop.set()
        await eventually(running.application.stopping.is_set)
        await say(connection, "generate", "b", **chat())
        assert (await hear(connection))["error"]["code"] == "stopping"
        gate.set()
        assert text_of(await hear_all(connection, 1), "a") == said(20)
        with pytest.raises(websockets.ConnectionClosed) as caught:
            await hear(connection)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1001


async def test_what_outlives_the_drain_is_told_so_and_the_connection_goes_away() -> None:
    never = asyncio.Event()
    async with gateway(TwinMesh(script=Script(gate=never)), drain_timeout_s=0.2) as running, connected(running) as connection:
        await say(connection, "generate", "a", **chat())
        await eventually(lambda: len(running.mesh.open) == 1)
        running.stop.set()
        frame = await hear(connection)
        assert (frame["id"], frame["error"]["code"]) == ("a", "stopping")
        with pytest.raises(websockets.ConnectionClosed) as caught:
            await hear(connection)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1001


async def test_an_idle_connection_goes_away_at_once() -> None:
    async with gateway() as running, connected(running) as connection:
        await say(connection, "generate", "a", **chat())
        assert (await hear_all(connection, 1))[-1]["type"] == "done"
        running.stop.set()
        with pytest.raises(websockets.ConnectionClosed) as caught:
            await hear(connection)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1001
