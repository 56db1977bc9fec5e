"""`segue serve` with the real model, as a stranger would use it."""

import asyncio
import json
import os
import signal

import httpx
import openai
import pytest
import websockets

from tests.e2e.serving import Serving, serving

pytestmark = [pytest.mark.model, pytest.mark.servers, pytest.mark.timeout(600)]
MODEL = "SmolLM2-135M-Instruct"
QUICK = ("--engine", "synthetic", "--kv-cache-memory", "64MiB", "--max-model-len", "512")
SMALL = ("--kv-cache-memory", "500MiB", "--max-model-len", "2048")


async def test_streams_by_three_clients_then_a_death_a_freeze_and_the_end() -> None:
    async with serving(*SMALL) as running:
        await running.until("segue: ready at")
        assert "curl -N" in running.output
        commands = " | ".join(running.children().values())
        for part in ("nats-server", "valkey-server", "services.prefill", "services.decode", "services.gateway"):
            assert part in commands
        assert "over shm" in running.output
        await twenty_by_sse(running)
        await twenty_by_websocket(running)
        await twenty_by_openai(running)
        await a_stream_outlives_its_decode_worker(running)
        await a_frozen_worker_is_replaced(running)
        running.process.send_signal(signal.SIGINT)
        assert await running.ended() == 0
        await running.nothing_left()


def chat(number: int, *, stream: bool = True) -> dict[str, object]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"Write a line about the number {number}."}],
        "max_tokens": 12,
        "temperature": 0,
        "stream": stream,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }


async def sse_text(client: httpx.AsyncClient, url: str, body: dict[str, object]) -> tuple[str, int]:
    """The text of a stream and its counted tokens; the stream must end with [DONE]."""
    text, tokens, done = "", 0, False
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                assert "error" not in event, event
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
                for choice in event["choices"]:
                    text += choice["delta"].get("content") or ""
    assert done
    return text, tokens


async def twenty_by_sse(running: Serving) -> None:
    async with httpx.AsyncClient(timeout=120) as client:
        results = await asyncio.gather(*(sse_text(client, running.url, chat(n)) for n in range(20)))
        whole = (await client.post(f"{running.url}/v1/chat/completions", json=chat(3, stream=False) | {"stream_options": None})).json()
    assert all(text and tokens == 12 for text, tokens in results)
    assert whole["choices"][0]["message"]["content"] == results[3][0]


async def twenty_by_websocket(running: Serving) -> None:
    texts = {str(n): "" for n in range(20)}
    ended = set()
    async with websockets.connect(f"ws://127.0.0.1:{running.port}/v1/stream") as connection:
        for n in range(20):
            await connection.send(json.dumps({"type": "generate", "id": str(n), **chat(n)}))
        async with asyncio.timeout(120):
            while len(ended) < 20:
                event = json.loads(await connection.recv())
                assert event["type"] in ("ready", "accepted", "token", "done"), event
                if event["type"] == "token":
                    texts[event["id"]] += event["text"]
                elif event["type"] == "done":
                    ended.add(event["id"])
    assert all(texts.values())


async def twenty_by_openai(running: Serving) -> None:
    async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        assert [model.id for model in (await client.models.list()).data] == [MODEL]

        async def one(number: int) -> str:
            stream = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": f"Count to {number}."}], max_tokens=10, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

        assert all(await asyncio.gather(*(one(n) for n in range(20))))


async def a_stream_outlives_its_decode_worker(running: Serving) -> None:
    """Greedy text is what it would have been, and the supervisor starts a new worker."""
    async with httpx.AsyncClient(timeout=120) as client:
        body = chat(77) | {"max_tokens": 60}
        expected = await sse_text(client, running.url, body)
        streaming = asyncio.create_task(sse_text(client, running.url, body))
        await asyncio.sleep(0.8)
        os.kill(running.child("services.decode"), signal.SIGKILL)
        assert await streaming == expected
        await running.until("decode-0   ready", times=2)


async def a_frozen_worker_is_replaced(running: Serving) -> None:
    os.kill(running.child("services.prefill"), signal.SIGSTOP)
    await running.until("prefill-0  ready", times=2)
    async with httpx.AsyncClient(timeout=120) as client:
        text, _ = await sse_text(client, running.url, chat(5))
        assert text


async def test_a_second_interrupt_ends_at_once() -> None:
    async with serving(*QUICK, "--synthetic-step-s", "1") as running:
        await running.until("segue: ready at")
        async with httpx.AsyncClient(timeout=30) as client:
            body = {"model": "SmolLM2-135M-Instruct", "prompt": "a", "max_tokens": 100, "stream": True}
            async with client.stream("POST", f"{running.url}/v1/completions", json=body) as response:
                assert response.status_code == 200
                running.process.send_signal(signal.SIGINT)
                await running.until("stopping", timeout_s=10)
                running.process.send_signal(signal.SIGINT)
                await running.ended(10)
        await running.nothing_left()
