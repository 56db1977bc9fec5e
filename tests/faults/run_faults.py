"""`./tools/test --faults`: every fault on a mesh of real processes, and a table of what became of the streams.

usage: ./tools/test --faults [--only TEXT] [--real-model] [--repeat N]

  --only TEXT    faults whose `group: name` holds this text; may be given several times
  --real-model   SmolLM2-135M-Instruct instead of the synthetic engine
  --repeat N     each fault this many times (default: 1)

Under each fault a mix of requests (greedy, seeded, log-probabilities, stop strings, two choices, a long prompt, chat) streams
through two gateways. Afterwards the same requests run undisturbed, and every event must be the same, byte for byte.

Columns: `resumed` counts how often clients had to come back; `down` members that died or froze; `silence` is the longest one
between two events of a stream; `bound` the watchdog's, as gateways state it; `first` the longest wait for a first event; `left` what
was not free or zero 10 s later, and keys that never expire; `unmet` what the fault itself expected and did not find.
"""

import argparse
import asyncio
import secrets
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from tests.faults.fault import Fault
from tests.faults.fault_cases import faults
from tests.faults.fault_client import Record, requests, run
from tests.faults.fault_laws import Outcome, endless_keys, highest_bound_s, left_behind, lost, wrong
from tests.faults.fault_mesh import WORKERS, FaultMesh, fault_mesh
from tests.faults.two_hosts import why_not_two_hosts
from tests.faults.world import REAL, SYNTHETIC, World

UNDER_WAY = 3
"""Faults that come from outside begin when this many streams have had their first event."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(usage=__doc__, add_help=True)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--real-model", action="store_true")
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args(arguments)
    only = options.only or [""]
    chosen = [fault for fault in faults() if any(text in f"{fault.group}: {fault.name}" for text in only)] * options.repeat
    if not chosen:
        print(f"no fault's name holds {only!r}; there are: {'; '.join(f'{f.group}: {f.name}' for f in faults())}")
        return 2
    if options.real_model:
        chosen = [replace(fault, world=REAL) for fault in chosen if fault.world == SYNTHETIC]
    outcomes = asyncio.run(run_all(chosen, show=True))
    print()
    for line in summary(outcomes):
        print(line)
    bad = [outcome for outcome in outcomes if not outcome.is_good]
    print(
        f"\n{len(outcomes)} faults, {sum(o.streams for o in outcomes)} streams, {len(bad)} faults with something lost, wrong or left"
    )
    if (reason := why_not_two_hosts()) is not None:
        print(f"not run: {reason}")
    return 1 if bad else 0


async def run_all(chosen: Sequence[Fault], *, show: bool = False) -> list[Outcome]:
    """One mesh for all neighbours of one world, whole again before each fault."""
    outcomes = []
    if show:
        columns = ("streams", "lost", "wrong", "resumed", "down", "silence s", "bound s", "first s", "left", "keys", "unmet")
        print(_row("fault", *columns), flush=True)
    for world, neighbours in groupby(chosen, key=lambda fault: fault.world):
        async with fault_mesh(world) as mesh:
            for fault in neighbours:
                outcome = await run_one(mesh, fault)
                outcomes.append(outcome)
                if show:
                    _show(outcome)
    return outcomes


async def run_one(mesh: FaultMesh, fault: Fault) -> Outcome:
    if fault.armed:
        await mesh.arm(dict(fault.armed), stay=fault.stays_armed)
    await mesh.whole()
    down = mesh.taken_down()
    nonce = secrets.token_hex(4)
    records, undisturbed = _mix(fault.world, nonce), _mix(fault.world, nonce)
    unmet = list(await fault.before(mesh)) if fault.before is not None else []
    streamed = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(highest_bound_s(mesh, streamed))
        unmet += await _stream(mesh, records, fault)
        streamed.set()
    bound_s = watching.result()
    await mesh.whole()
    down = mesh.taken_down() - down
    if fault.stays_armed or any("=flip" in failpoint for _, failpoint in fault.armed):
        await mesh.arm({name: "" for name, _ in fault.armed})
    left = await left_behind(mesh)
    await asyncio.gather(*(run(record, mesh.gateway_urls) for record in undisturbed))
    endless, keys = await endless_keys(mesh)
    losses, errors = lost(records), wrong(records, undisturbed)
    if fault.leaves is not None and not sum([await mesh.metric(name, fault.leaves) for name in WORKERS]):
        unmet.append(f"the fault did not happen: {fault.leaves} is 0")
    if not down and any("=kill" in failpoint or "=stop" in failpoint for _, failpoint in fault.armed):
        unmet.append("the fault did not happen: nobody died or froze")
    return Outcome(
        fault=fault.name,
        group=fault.group,
        streams=len(records),
        lost=len(losses),
        wrong=len(errors),
        resumed=sum(record.resumed for record in records),
        deaths=down,
        silence_s=max(record.longest_silence_s for record in records),
        first_event_s=max(record.first_event_s for record in records),
        bound_s=bound_s,
        left=tuple(left),
        endless=endless,
        keys=keys,
        unmet=len(unmet),
        notes=(*losses, *errors, *unmet, *(f"undisturbed {note}" for note in lost(undisturbed))),
    )


def _mix(world: World, nonce: str) -> list[Record]:
    return requests(nonce, tokens=world.tokens, long_prompts=world.long_prompts)


async def _stream(mesh: FaultMesh, records: Sequence[Record], fault: Fault) -> Sequence[str]:
    """Half of the clients begin at each gateway. Returns what the fault expected and did not find."""
    urls = mesh.gateway_urls
    mesh.others_ended.clear()
    async with asyncio.TaskGroup() as tasks:
        injecting = tasks.create_task(_inject(mesh, records, fault))
        async with asyncio.TaskGroup() as streams:
            for number, record in enumerate(records):
                streams.create_task(run(record, urls if number % 2 == 0 else urls[::-1]))
        mesh.others_ended.set()
    return injecting.result()


async def _inject(mesh: FaultMesh, records: Sequence[Record], fault: Fault) -> Sequence[str]:
    if fault.inject is None:
        return ()
    async with asyncio.timeout(30):
        while sum(bool(record.events) for record in records) < UNDER_WAY:
            await asyncio.sleep(0.01)
    return await fault.inject(mesh)


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    """A line a group, as a table in Markdown."""
    lines = [
        "| faults | cases | streams | lost | wrong | longest silence s | left behind | keys without end |",
        "| --- |" + " --- |" * 7,
    ]
    for group in dict.fromkeys(outcome.group for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.group == group]
        counts = [sum(of) for of in zip(*((o.streams, o.lost + o.unmet, o.wrong, len(o.left), o.endless) for o in mine), strict=True)]
        silence = f"{max(outcome.silence_s for outcome in mine):.2f}"
        lines.append(f"| {group} | {len(mine)} | {' | '.join(map(str, counts[:3]))} | {silence} | {counts[3]} | {counts[4]} |")
    return lines


def _show(outcome: Outcome) -> None:
    left = len(outcome.left) + outcome.endless
    seconds = [f"{value:.2f}" for value in (outcome.silence_s, outcome.bound_s, outcome.first_event_s)]
    counts = (outcome.streams, outcome.lost, outcome.wrong, outcome.resumed, outcome.deaths)
    print(_row(outcome.fault, *counts, *seconds, left, outcome.keys, outcome.unmet), flush=True)
    for note in (*outcome.notes, *outcome.left):
        print(f"    {note}", flush=True)


def _row(fault: object, *columns: object) -> str:
    return f"{fault!s:<42}" + "".join(f"{column!s:>10}" for column in columns)


if __name__ == "__main__":
    sys.exit(main())
