"""What the mesh itself costs: engines of zero step time, disaggregated, one event a token, under `wrk` on the same cores.

    python -m tests.benchmarks.control_plane [--seconds 8] [--prefill 2] [--decode 2] [serve's flags …]

CPU a token and a request by kind of process, tokens and requests a second of the whole mesh. Prompts have 64 tokens; 64 of them
are sent in turn, so that most of a prompt is in the prefix caches after the first round, as with the peers that this is compared
with. Needs `wrk` (Debian has it). `--synthetic-step-s 0.01` and the like paces the engines instead.
"""

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.e2e.serving import Serving, serving
from tools.bench_load.prompts import learn_words

PROMPTS = 64
PROMPT_TOKENS = 64
CASES = ((64, 1), (16, 128), (256, 128))
KINDS = ("gateway", "prefill", "decode", "nats-server", "valkey-server", "serve")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
IDLE_ENGINES = (
    *("--engine", "synthetic", "--synthetic-step-s", "0", "--synthetic-prefill-token-s", "0", "--synthetic-decode-row-s", "0"),
    *("--no-synthetic-checks", "--synthetic-kv-token-bytes", "16", "--kv-cache-memory", "16MiB", "--dtype", "float32"),
    *("--max-num-seqs", "256", "--max-num-batched-tokens", "4096"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """`failed` counts answers that were no 200, and time-outs. `cpu_s` is by kind of process."""

    streams: int
    tokens: int
    requests: int
    failed: int
    seconds: float
    cpu_s: dict[str, float]


def cpu_by_kind(running: Serving) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for pid, command in {running.process.pid: "serve", **running.children()}.items():
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        found = re.search(r"services\.(\w+)|(nats-server|valkey-server)", command)
        total[(found[1] or found[2]) if found else "serve"] += (int(fields[11]) + int(fields[12])) / TICKS_PER_S
    return total


async def ask(client: httpx.AsyncClient, url: str, model: str, text: str, tokens: int) -> tuple[int, int]:
    """(prompt tokens, events with a token) of one stream."""
    body = request_body(model, text, tokens) | {"stream_options": {"include_usage": True}}
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        chunks = [json.loads(line[6:]) async for line in response.aiter_lines() if line.startswith("data: {")]
    return chunks[-1]["usage"]["prompt_tokens"], sum(1 for chunk in chunks if chunk["choices"])


def request_body(model: str, text: str, tokens: int) -> dict[str, object]:
    messages = [{"role": "user", "content": text}]
    return {"model": model, "stream": True, "temperature": 0, "max_tokens": tokens, "ignore_eos": True, "messages": messages}


async def make_prompts(client: httpx.AsyncClient, url: str, model: str) -> list[str]:
    async def count(text: str) -> int:
        return (await ask(client, url, model, text, 1))[0]

    words = await learn_words(count)
    rng = random.Random(0)
    return [words.text(PROMPT_TOKENS, rng) for _ in range(PROMPTS)]


def wrk_script(folder: Path, model: str, prompts: list[str], tokens: int) -> Path:
    bodies = ",".join(f"[=[{json.dumps(request_body(model, text, tokens))}]=]" for text in prompts)
    path = folder / f"{tokens}.lua"
    path.write_text(
        f"local bodies={{{bodies}}}\nlocal i=0\nwrk.method='POST'\nwrk.headers['Content-Type']='application/json'\n"
        "function request() i=i%#bodies+1; return wrk.format(nil,'/v1/chat/completions',nil,bodies[i]) end\n"
    )
    return path


def load(running: Serving, script: Path, streams: int, tokens: int, seconds: int) -> Point:
    before = cpu_by_kind(running)
    command = ["wrk", "-t1", f"-c{streams}", f"-d{seconds}s", "--timeout", "30s", "-s", str(script), running.url]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    after = cpu_by_kind(running)
    done = re.search(r"(\d+) requests in ([\d.]+)s", output)
    assert done is not None, output
    failures = re.findall(r"Non-2xx or 3xx responses: (\d+)|timeout (\d+)", output)
    return Point(
        streams=streams,
        tokens=tokens,
        requests=int(done[1]),
        failed=sum(int(number) for pair in failures for number in pair if number),
        seconds=float(done[2]),
        cpu_s={kind: after[kind] - before[kind] for kind in KINDS},
    )


def show(points: list[Point]) -> None:
    print("\n| streams x tokens | requests/s | tokens/s | failed | CPU µs a | " + " | ".join(KINDS) + " |")
    print("| --- " * (5 + len(KINDS)) + "|")
    for point in points:
        good = max(1, point.requests - point.failed)
        units = [("request", good)] + ([("token", good * point.tokens)] if point.tokens > 1 else [])
        for name, count in units:
            costs = " | ".join(f"{point.cpu_s[kind] / count * 1e6:.1f}" for kind in KINDS)
            rate = good / point.seconds
            print(
                f"| {point.streams} x {point.tokens} | {rate:,.0f} | {rate * point.tokens:,.0f} | {point.failed} | {name} | {costs} |"
            )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--prefill", type=int, default=2)
    parser.add_argument("--decode", type=int, default=2)
    own, flags = parser.parse_known_args()
    if shutil.which("wrk") is None:
        sys.exit("control_plane: there is no wrk: install it (apt-get install wrk)")
    counts = ("--prefill", str(own.prefill), "--decode", str(own.decode))
    async with serving(*IDLE_ENGINES, *counts, *flags) as running, httpx.AsyncClient(timeout=60) as client:
        await running.until("segue: ready at")
        await running.until(" ready: ", times=own.prefill + own.decode)
        model = (await client.get(f"{running.url}/v1/models")).json()["data"][0]["id"]
        prompts = await make_prompts(client, running.url, model)
        seen = await ask(client, running.url, model, prompts[0], 128)
        assert seen[0] == PROMPT_TOKENS, f"prompts have {seen[0]} tokens"
        print(f"one stream of 128 tokens: {seen[1]} events")
        with tempfile.TemporaryDirectory() as folder:
            scripts = {tokens: wrk_script(Path(folder), model, prompts, tokens) for _, tokens in CASES}
            await asyncio.to_thread(load, running, scripts[1], 16, 1, 2)
            show([await asyncio.to_thread(load, running, scripts[n], streams, n, own.seconds) for streams, n in CASES])


if __name__ == "__main__":
    asyncio.run(main())
