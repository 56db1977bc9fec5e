"""`segue simulate-faults`: the whole mesh in virtual time, under faults that are drawn from a seed.

Each seed is one small world: real cores of workers and gateways, a broker that loses and delays, processes that die, freeze
and come back, partitions, corrupt bytes, clients that leave. The same seed gives the same world, line by line: run a failing
one again with `--trace`. The exit status is 1 where a law was broken.
"""

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

from common.simulation.fault_strength import FaultStrength
from common.simulation.mesh_world import MeshWorld
from common.simulation.schedule import START_S

CHUNK = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of one seed: the law that was broken (None: all held), what happened in the world, and how much of it."""

    seed: int
    broken: str | None
    counts: Counter[str]
    actions: int
    virtual_s: float
    trace: tuple[str, ...] = ()


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    logging.disable()  # thousands of worlds in which the store is away
    if options.seed is not None:
        return _replay(options.seed, trace=options.trace)
    started = time.monotonic()
    total: Counter[str] = Counter()
    broken = []
    for outcome in run_seeds(range(options.first, options.first + options.seeds), jobs=options.jobs):
        total.update(outcome.counts)
        total.update(worlds=1, actions=outcome.actions, virtual_s=int(outcome.virtual_s))
        if outcome.broken is not None:
            broken.append(outcome)
            print(f"seed {outcome.seed}: {outcome.broken}", flush=True)
    for what, count in sorted(total.items()):
        print(f"{what:32} {count:12,}")
    seconds = time.monotonic() - started
    print(f"{total['worlds']:,} worlds in {seconds:.1f} s, {len(broken)} with a broken law")
    if broken:
        print(f"read one: ./tools/segue simulate-faults --seed {broken[0].seed} --trace")
    return 1 if broken else 0


def run_seeds(seeds: Iterable[int], *, jobs: int = 1) -> Iterator[Outcome]:
    """In order of the seeds, whatever `jobs` is."""
    if jobs == 1:
        yield from map(run_seed, seeds)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(run_seed, seeds, chunksize=CHUNK)


def run_seed(seed: int, *, trace: bool = False, strength: FaultStrength | None = None) -> Outcome:
    """A world that breaks in any way breaks a law: nothing in it may raise. `strength` replaces what the seed draws."""
    world = MeshWorld(seed, strength=strength, trace=trace)
    broken = None
    try:
        world.run()
    except Exception as error:
        broken = f"{type(error).__name__}: {error}"
        world.around.note("world", broken)
    schedule = world.around.schedule
    return Outcome(
        seed=seed,
        broken=broken,
        counts=world.around.counts,
        actions=schedule.ran,
        virtual_s=schedule.now - START_S,
        trace=tuple(world.around.trace or ()),
    )


def _replay(seed: int, *, trace: bool) -> int:
    outcome = run_seed(seed, trace=trace)
    for line in outcome.trace:
        print(line)
    print(f"seed {seed}: {outcome.broken or 'all laws held'} ({outcome.actions:,} actions)")
    return 0 if outcome.broken is None else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="segue simulate-faults", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    number = partial(parser.add_argument, type=int)
    number("--seeds", default=1000, help="how many worlds (default 1000)")
    number("--first", default=0, help="the first seed (default 0)")
    number("--jobs", default=1, help="processes (default 1)")
    number("--seed", help="this world alone")
    parser.add_argument("--trace", action="store_true", help="with --seed: tell what happens, line by line")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
