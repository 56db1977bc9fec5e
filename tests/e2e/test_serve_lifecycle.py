"""How `segue serve` starts, refuses and ends; with the synthetic engine, so that no weights are loaded."""

import os
import signal
import socket

import httpx
import pytest

from tests.e2e.serving import serving

pytestmark = [pytest.mark.model, pytest.mark.servers, pytest.mark.timeout(180)]
QUICK = ("--engine", "synthetic", "--kv-cache-memory", "64MiB", "--max-model-len", "512")


async def test_two_colocated_workers_and_no_others() -> None:
    async with serving("--both", "2", *QUICK) as running:
        await running.until("segue: ready at")
        commands = list(running.children().values())
        assert sum("services.decode" in c for c in commands) == 2
        assert not any("services.prefill" in c for c in commands)
        async with httpx.AsyncClient(timeout=30) as client:
            body = {"model": "SmolLM2-135M-Instruct", "prompt": "one two three", "max_tokens": 5}
            answer = await client.post(f"{running.url}/v1/completions", json=body)
            assert answer.json()["usage"]["completion_tokens"] == 5
        running.process.send_signal(signal.SIGINT)
        assert await running.ended() == 0
        await running.nothing_left()


async def test_nothing_is_left_when_serve_itself_is_killed() -> None:
    async with serving(*QUICK) as running:
        await running.until("segue: ready at")
        os.kill(running.process.pid, signal.SIGKILL)
        await running.nothing_left()


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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("/no/such/model",), "/no/such/model"),
        (("--nats-url", "nats://127.0.0.1:1"), "127.0.0.1:1"),
        (("--redis-url", "redis://127.0.0.1:1"), "127.0.0.1:1"),
        (("--max-model-len", "9000000"), "--max-model-len"),
        (("--kv-cache-memory", "900GiB"), "GiB"),
        (("--no-such-flag", "3"), "no-such-flag"),
        (("--host", "0.0.0.0"), "API key"),
    ],
)
async def test_what_cannot_work_is_refused_before_anything_starts(arguments: tuple[str, ...], says: str) -> None:
    async with serving(*arguments) as running:
        assert await running.ended() == 2
        await running.nothing_left()
    assert says in running.output
    assert "Traceback" not in running.output


async def test_a_taken_port_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        async with serving(port=taken.getsockname()[1]) as running:
            assert await running.ended() == 2
    assert "port" in running.output
