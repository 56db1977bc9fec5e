"""`./tools/test --soak`: a mixed load over a mesh of real processes that die and freeze at random, for minutes.

usage: ./tools/test --soak [--minutes N] [--seed N] [--clients N]

  --minutes N   how long the load lasts (default: 10)
  --seed N      what is asked and what dies, and when (default: 1)
  --clients N   requests at once (default: 6)

Every few seconds one process of p0, d0 and g0 is killed or frozen (a frozen one wakes up after 8 s), or nats-server is away for a
second; the next fault waits until the mesh is whole. p1, d1, g1 and the brokers survive: their memory must stay flat. At the end
every request runs once more, undisturbed, and every event must be the same. The exit status is 0 only then.
"""

import argparse
import asyncio
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.faults.fault_client import Record, requests, run
from tests.faults.fault_laws import endless_keys, left_behind, lost, wrong
from tests.faults.fault_mesh import FaultMesh, fault_mesh
from tests.faults.soak_figures import Figures, watch
from tests.faults.world import SYNTHETIC

VICTIMS = ("p0", "d0", "g0")
BETWEEN_FAULTS_S = (2.0, 6.0)
NATS_SHARE = 0.1
RERUNS_AT_ONCE = 24


@dataclass
class Soak:
    """What the load has done so far. Requests are kept as they were asked, to be asked again."""

    mesh: FaultMesh
    seed: int
    records: list[Record] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    ends: float = 0.0

    @property
    def goes_on(self) -> bool:
        return time.monotonic() < self.ends


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(usage=__doc__, add_help=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=6)
    options = parser.parse_args(arguments)
    return asyncio.run(soak(options.minutes * 60, options.seed, options.clients))


async def soak(seconds: float, seed: int, clients: int) -> int:
    async with fault_mesh(SYNTHETIC) as mesh:
        state = Soak(mesh, seed, ends=time.monotonic() + seconds)
        figures = Figures()
        watching = asyncio.create_task(watch(mesh, figures, lambda: len(state.records)))
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_faults(state))
                for number in range(clients):
                    tasks.create_task(_client(state, number))
        finally:
            watching.cancel()
            await asyncio.wait([watching])
        await mesh.whole()
        left = await left_behind(mesh)
        print(f"{len(state.records)} streams under {dict(state.faults)}; now each once more, undisturbed", flush=True)
        bad = lost(state.records) + wrong(state.records, await _undisturbed(state))
        endless, keys = await endless_keys(mesh)
    silence = max(record.longest_silence_s for record in state.records)
    counts = {"lost or wrong": len(bad), "left behind": len(left), "keys": keys, "endless keys": endless}
    counts |= {"resumed": sum(r.resumed for r in state.records), "moved": sum(r.moved for r in state.records)}
    print("; ".join(f"{name}: {count}" for name, count in counts.items()) + f"; longest silence {silence:.2f} s")
    for line in (*bad, *left, *figures.lines()):
        print(f"    {line}")
    return 1 if bad or left or endless else 0


async def _client(state: Soak, number: int) -> None:
    """One request after the other, of any kind, at either gateway."""
    choice = random.Random(f"{state.seed} {number}")
    while state.goes_on:
        record = choice.choice(_kinds(choice))
        state.records.append(record)
        urls = state.mesh.gateway_urls
        await run(record, urls if choice.random() < 0.5 else urls[::-1])


def _kinds(choice: random.Random) -> list[Record]:
    return requests(f"{choice.getrandbits(32):08x}", tokens=choice.choice((16, 48, 120)))


async def _faults(state: Soak) -> None:
    choice = random.Random(state.seed)
    while state.goes_on:
        await asyncio.sleep(choice.uniform(*BETWEEN_FAULTS_S))
        await state.mesh.whole()
        if choice.random() < NATS_SHARE:
            state.faults["nats away"] += 1
            await state.mesh.nats.kill()
            await asyncio.sleep(1.0)
            await state.mesh.nats.start()
            continue
        name, number = choice.choice(VICTIMS), choice.choice((signal.SIGKILL, signal.SIGSTOP))
        state.faults[f"{name} {'killed' if number is signal.SIGKILL else 'frozen'}"] += 1
        state.mesh.members[name].signal(number)


async def _undisturbed(state: Soak) -> list[Record]:
    again = [Record(record.kind, record.path, record.body) for record in state.records]
    gate = asyncio.Semaphore(RERUNS_AT_ONCE)

    async def one(record: Record) -> None:
        async with gate:
            await run(record, state.mesh.gateway_urls)

    await asyncio.gather(*(one(record) for record in again))
    return again


if __name__ == "__main__":
    sys.exit(main())
