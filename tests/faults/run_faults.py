"""`./tools/test --faults`: every fault on a mesh of real processes, and a table of what became of the streams.

usage: ./tools/test --faults [--only TEXT] [--real-model] [--repeat N]

  --only TEXT    faults whose name holds this text
  --real-model   SmolLM2-135M-Instruct instead of the synthetic engine
  --repeat N     each fault this many times (default: 1)

Under each fault a mix of requests (greedy, seeded, log-probabilities, stop strings, two choices, a long prompt, chat) streams
through two gateways. Afterwards the same requests run undisturbed, and every event must be the same, byte for byte.
"""

import argparse
import asyncio
import secrets
import sys
from collections.abc import Sequence
from contextlib import suppress

from tests.faults.fault_cases import Fault, faults, wake_frozen
from tests.faults.fault_client import Record, requests, run
from tests.faults.fault_laws import Outcome, endless_keys, left_behind, lost, wrong
from tests.faults.fault_mesh import WORKERS, FaultMesh, fault_mesh

SYNTHETIC = ("--engine", "synthetic", "--kv-cache-memory", "128MiB", "--max-model-len", "1536", "--synthetic-step-s", "0.02")
REAL = ("--kv-cache-memory", "512MiB", "--max-model-len", "2048", "--dtype", "float32")
UNDER_WAY = 3
"""Faults that come from outside begin when this many streams have had their first event."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(usage=__doc__, add_help=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--real-model", action="store_true")
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args(arguments)
    chosen = [fault for fault in faults() if options.only in fault.name] * options.repeat
    if not chosen:
        print(f"no fault's name holds {options.only!r}; there are: {'; '.join(f.name for f in faults())}")
        return 2
    outcomes = asyncio.run(run_all(chosen, REAL if options.real_model else SYNTHETIC, show=True))
    bad = [outcome for outcome in outcomes if not outcome.is_good]
    print(
        f"\n{len(outcomes)} faults, {sum(o.streams for o in outcomes)} streams, {len(bad)} faults with something lost, wrong or left"
    )
    return 1 if bad else 0


async def run_all(chosen: Sequence[Fault], flags: Sequence[str], *, show: bool = False) -> list[Outcome]:
    """One mesh for all, whole again before each fault."""
    outcomes = []
    async with fault_mesh(*flags) as mesh:
        if show:
            print(_row("fault", "streams", "lost", "wrong", "resumed", "deaths", "silence s", "first s", "left", "keys"), flush=True)
        for fault in chosen:
            outcome = await run_one(mesh, fault)
            outcomes.append(outcome)
            if show:
                _show(outcome)
    return outcomes


async def run_one(mesh: FaultMesh, fault: Fault) -> Outcome:
    for name, failpoint in fault.armed:
        await mesh.restart(name, failpoint)
    await mesh.whole()
    deaths = mesh.deaths
    nonce = secrets.token_hex(4)
    records = requests(nonce)
    waking = asyncio.create_task(wake_frozen(mesh))
    try:
        await _stream(mesh, records, fault)
        await mesh.whole()
    finally:
        waking.cancel()
        with suppress(asyncio.CancelledError):
            await waking
    for name, failpoint in fault.armed:
        if "=flip" in failpoint:
            await mesh.restart(name)
    left = await left_behind(mesh)
    undisturbed = requests(nonce)
    await asyncio.gather(*(run(record, mesh.gateway_urls) for record in undisturbed))
    endless, keys = await endless_keys(mesh)
    losses, errors = lost(records), wrong(records, undisturbed)
    if fault.leaves is not None and not sum([await mesh.metric(name, fault.leaves) for name in WORKERS]):
        losses.append(f"the fault did not happen: {fault.leaves} is 0")
    return Outcome(
        fault=fault.name,
        streams=len(records),
        lost=len(losses),
        wrong=len(errors),
        resumed=sum(record.resumed for record in records),
        deaths=mesh.deaths - deaths,
        silence_s=max(record.longest_silence_s for record in records),
        first_event_s=max(record.first_event_s for record in records),
        left=tuple(left),
        endless=endless,
        keys=keys,
        notes=(*losses, *errors, *(f"undisturbed {note}" for note in lost(undisturbed))),
    )


async def _stream(mesh: FaultMesh, records: Sequence[Record], fault: Fault) -> None:
    """Half of the clients begin at each gateway."""
    urls = mesh.gateway_urls
    async with asyncio.TaskGroup() as tasks:
        for number, record in enumerate(records):
            tasks.create_task(run(record, urls if number % 2 == 0 else urls[::-1]))
        if fault.inject is not None:
            async with asyncio.timeout(30):
                while sum(bool(record.events) for record in records) < UNDER_WAY:
                    await asyncio.sleep(0.01)
            await fault.inject(mesh)


def _show(outcome: Outcome) -> None:
    left = len(outcome.left) + outcome.endless
    figures = (outcome.streams, outcome.lost, outcome.wrong, outcome.resumed, outcome.deaths)
    print(_row(outcome.fault, *figures, f"{outcome.silence_s:.2f}", f"{outcome.first_event_s:.2f}", left, outcome.keys), flush=True)
    for note in (*outcome.notes, *outcome.left):
        print(f"    {note}", flush=True)


def _row(fault: object, *columns: object) -> str:
    return f"{fault!s:<42}" + "".join(f"{column!s:>10}" for column in columns)


if __name__ == "__main__":
    sys.exit(main())
