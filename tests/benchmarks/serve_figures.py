"""The figures of one `segue serve` on this machine, unloaded: TTFT and TPOT at 256+64, idle CPU of all its processes, and
how much of a 512-token prompt's hand-off prefill did not hide.

    python -m tests.benchmarks.serve_figures [--repeats 7] [serve's flags …]

Prints a table and, as its last line, JSON. Every prompt is new, so the prefix cache helps nobody. Run it on a quiet machine.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.e2e.serving import Serving, serving

MODEL = "SmolLM2-135M-Instruct"
IDLE_S = 20.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Latency:
    """Medians over the repeats, in seconds."""

    ttft_s: float
    tpot_s: float


async def measure(url: str, client: httpx.AsyncClient, prompt_tokens: int, new_tokens: int, repeats: int) -> Latency:
    ttfts, tpots = [], []
    for seed in range(repeats):
        rng = random.Random(f"{prompt_tokens} {seed} {time.time_ns()}")
        prompt = [rng.randrange(100, 40_000) for _ in range(prompt_tokens)]
        body = {"model": MODEL, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        began = time.perf_counter()
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            stamps = [time.perf_counter() async for line in response.aiter_lines() if line.startswith("data: {")]
        ttfts.append(stamps[0] - began)
        tpots.append((stamps[-1] - stamps[0]) / (new_tokens - 1))
    return Latency(statistics.median(ttfts), statistics.median(tpots))


def cpu_seconds(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS_PER_S


async def idle_cores(running: Serving) -> dict[str, float]:
    """Cores used by each process while nothing is asked of it."""
    pids = {running.process.pid: "serve", **running.children()}
    before = {pid: cpu_seconds([pid]) for pid in pids}
    await asyncio.sleep(IDLE_S)
    return {_label(command): round((cpu_seconds([pid]) - before[pid]) / IDLE_S, 5) for pid, command in pids.items()}


def _label(command: str) -> str:
    found = re.search(r"services\.(\w+)|(nats-server|valkey-server)", command)
    return (found[1] or found[2]) if found else "serve"


async def exposed_seconds(running: Serving, client: httpx.AsyncClient) -> tuple[float, int]:
    """Sum and count of the prefill workers' hand-off histogram."""
    total, count = 0.0, 0
    for url in re.findall(r"prefill-\d+ +ready: .*(http://\S+/metrics)", running.output):
        text = (await client.get(url)).text
        total += float(re.search(r"segue_handoff_exposed_seconds_sum (\S+)", text)[1])  # type: ignore[index]
        count += int(re.search(r"segue_handoff_exposed_seconds_count (\S+)", text)[1])  # type: ignore[index]
    return total, count


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    own, flags = parser.parse_known_args()
    began = time.perf_counter()
    async with serving("--placement", "split", *flags) as running, httpx.AsyncClient(timeout=300) as client:
        await running.until("segue: ready at")
        ready_s = time.perf_counter() - began
        await measure(running.url, client, 256, 8, 2)
        at_256 = await measure(running.url, client, 256, 64, own.repeats)
        sum_before, count_before = await exposed_seconds(running, client)
        at_512 = await measure(running.url, client, 512, 8, own.repeats)
        sum_after, count_after = await exposed_seconds(running, client)
        await asyncio.sleep(2)
        idle = await idle_cores(running)
    exposed = (sum_after - sum_before) / max(1, count_after - count_before)
    rows = {
        "start to ready, s": round(ready_s, 1),
        "TTFT 256+64, ms": round(at_256.ttft_s * 1e3, 1),
        "TPOT 256+64, ms": round(at_256.tpot_s * 1e3, 2),
        "TTFT 512, ms": round(at_512.ttft_s * 1e3, 1),
        "hand-off of 512 tokens not hidden (mean), ms": round(exposed * 1e3, 2),
        "idle cores, all processes": round(sum(idle.values()), 4),
    }
    for name, value in rows.items():
        print(f"{name:<48} {value}")
    print(json.dumps({**rows, "idle": idle, "hand-offs": count_after - count_before}))


if __name__ == "__main__":
    asyncio.run(main())
