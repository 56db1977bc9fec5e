"""`segue bench` against a small OpenAI-like server on loopback: what it sends, counts and keeps. Asserted are order and sums,
never a duration."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.servers import free_port
from tools.bench_load.bench_refused import BenchRefused
from tools.bench_load.goodput import attainment
from tools.bench_load.http_client import HttpClient
from tools.bench_load.progress import ProgressBar
from tools.bench_load.request_class import Objective
from tools.bench_load.request_result import RequestResult
from tools.bench_load.results_file import Point, ResultsFile
from tools.bench_load.stages import summarise_stages
from tools.bench_load_options import read_options
from tools.bench_load_run import BenchRun

TEMPLATE_TOKENS = 6


@dataclass
class FakeOpenAI:
    """Answers with `max_tokens` events, cut anywhere; every `fails_every`th request fails in one of three ways."""

    port: int
    fails_every: int = 0
    bodies: list[dict[str, object]] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)

    async def serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        if head.startswith(b"GET /v1/requests/"):
            body = b'{"seconds":{"first_token":0.5,"end":2.0}}'
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        elif head.startswith(b"GET"):
            body = b'{"object":"list","data":[{"id":"small"}]}'
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        else:
            length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
            self.bodies.append(json.loads(await reader.readexactly(length)))
            number = len(self.bodies)
            failure = (number // self.fails_every) % 3 if self.fails_every and number % self.fails_every == 0 else None
            await self._answer(writer, self.bodies[-1], failure)
        writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, body: dict[str, object], failure: int | None) -> None:
        if failure == 0:
            writer.write(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\nfull")
            return
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Segue-Request-Id: r1\r\n\r\n")
        tokens = int(str(body["max_tokens"]))
        prompt = _tokens(body)
        events = [b'data: {"choices":[{"delta":{"content":"x"},"text":"x"}]}\n\n' for _ in range(tokens)]
        usage = {"prompt_tokens": prompt, "completion_tokens": tokens}
        end = [] if failure == 1 else [b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n"]
        if failure == 2:
            end = [b'data: {"error":{"message":"worker lost"}}\n\ndata: [DONE]\n\n']
        for event in events + end:
            for part in (event[:9], event[9:]):
                writer.write(b"%x\r\n" % len(part) + part + b"\r\n")
            await writer.drain()
            await asyncio.sleep(0)
        writer.write(b"0\r\n\r\n")


def _tokens(body: dict[str, object]) -> int:
    match body:
        case {"messages": [{"content": str(text)}]}:
            return len(text.split()) + TEMPLATE_TOKENS
        case {"prompt": list(ids)}:
            return len(ids)
    raise AssertionError(body)


@asynccontextmanager
async def fake_openai(fails_every: int = 0) -> AsyncIterator[FakeOpenAI]:
    fake = FakeOpenAI(free_port(), fails_every)
    server = await asyncio.start_server(fake.serve_one, "127.0.0.1", fake.port)
    async with server:
        yield fake


async def bench(fake: FakeOpenAI, *flags: str, results: Path | None = None) -> tuple[dict[str, Objective], list[Point]]:
    options = read_options(["--endpoint", f"http://127.0.0.1:{fake.port}", *flags])
    run = BenchRun(options, ResultsFile(results), ProgressBar(), cpu="here", commit="now")
    return await run.run()


def check(result: RequestResult) -> None:
    """Laws of any request that ended well."""
    assert result.ttft_s is not None
    assert result.ttft_s >= 0.0
    assert result.lag_s >= 0.0
    assert result.scheduled_s <= result.sent_s <= result.arrivals_s[0] <= result.arrivals_s[-1] <= result.ended_s
    assert all(gap >= 0.0 for gap in result.gaps_s)
    assert sum(result.gaps_s) == pytest.approx(result.arrivals_s[-1] - result.arrivals_s[0])
    assert result.prompt_tokens == result.planned_prompt_tokens
    assert result.output_tokens == result.planned_output_tokens == len(result.arrivals_s)


async def test_open_loop_sends_what_was_planned_and_counts_what_came() -> None:
    async with fake_openai() as fake:
        _, points = await bench(
            fake, "--class", "a:40:5:3", "--class", "b:17:1", "--rates", "400", "-n", "30", "--warmup", "4", "--seeds", "1,2"
        )
    assert [len(point.results) for point in points] == [34, 34]
    for point in points:
        assert len(point.measured) == 30
        for result in point.results:
            assert result.error is None
            check(result)
        assert {result.request_id for result in point.results} == {"r1"}
        stages = summarise_stages(point.measured)
        assert stages.timelines == 30
        assert stages.stages["after it"].mean == 1.5
        assert "prefill_started" in stages.missing
    sent = [json.dumps(body["messages"]) for body in fake.bodies]
    assert len(set(sent)) == len(sent), "no prompt twice"
    assert all(body["ignore_eos"] is True and body["temperature"] == 0 for body in fake.bodies)
    assert points[0].key.model == "small"


async def test_closed_loop_and_ids_and_a_key(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sesame\n")
    flags = ("--api", "completions", "--prompt", "ids", "--vocabulary", "5:9", "--api-key-file", str(key), "--model", "other")
    async with fake_openai() as fake:
        _, [point] = await bench(fake, *flags, "--class", "a:40:5", "--closed", "3", "-n", "10", "--warmup", "2")
    assert len(point.measured) == 10
    for result in point.results:
        check(result)
        assert result.scheduled_s == result.sent_s
    assert all(b"Bearer sesame" in head for head in fake.heads)
    assert {body["model"] for body in fake.bodies} == {"other"}
    assert point.real_rate is None


async def test_each_failure_is_a_miss_with_its_reason() -> None:
    async with fake_openai(fails_every=4) as fake:
        flags = ("--api", "completions", "--prompt", "ids", "--class", "a:4:3", "--slo", "a:9:9", "--rates", "500", "-n", "24")
        objectives, [point] = await bench(fake, *flags, "--warmup", "0")
    errors = [result.error for result in point.results if result.error is not None]
    assert len(errors) == 6
    for why in ("status 429: full", "ended early", "worker lost"):
        assert sum(why in error for error in errors) == 2
    assert attainment(point.results, objectives).good == 18


async def test_a_run_goes_on_where_it_was_broken_off(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    flags = ("--class", "a:40:2", "--rates", "300,600", "-n", "5", "--warmup", "1", "--slo-factors", "1000,1000", "--unloaded", "2")
    async with fake_openai() as fake:
        objectives, points = await bench(fake, *flags, results=results)
        asked = len(fake.bodies)
        again = await bench(fake, *flags, results=results)
        assert len(fake.bodies) == asked, "nothing is measured twice"
        assert again == (objectives, points)
        lines = results.read_bytes().splitlines(keepends=True)
        assert len(lines) == 3
        results.write_bytes(b"".join(lines[:2]))
        await bench(fake, *flags, results=results)
    assert len(fake.bodies) > asked
    assert len(results.read_bytes().splitlines()) == 3


async def test_the_knee_is_looked_for_with_pooled_seeds() -> None:
    async with fake_openai() as fake:
        flags = ("--api", "completions", "--prompt", "ids", "--class", "a:4:2", "-n", "3", "--warmup", "0", "--seeds", "1,2")
        _, points = await bench(fake, *flags, "--find-knee", "--rates", "1000", "--slo", "a:0.000000001:9")
        assert [point.key.rate for point in points] == [rate for rate in (1000 / 2**k for k in range(7)) for _ in (1, 2)]
        with pytest.raises(BenchRefused):
            await bench(fake, *flags, "--find-knee", "--rates", "1000")


async def test_a_server_that_is_not_there_is_said() -> None:
    with pytest.raises(BenchRefused, match="is it running"):
        await bench(FakeOpenAI(free_port()), "--rates", "5")
    answer = await HttpClient(read_options(["--endpoint", "127.0.0.1:9", "--model", "m"]).endpoint, lambda: 1.0).stream(b"")
    assert "no connection" in (answer.failure or "")
