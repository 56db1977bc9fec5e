"""How fast KV blocks move between two processes, tier by tier, beside a memcpy of the same bytes.

    python -m tools.bench_transfer [--tiers shm,ucx,tcp] [--tokens 512] [--repeats 31] [--json FILE]

The default is a prompt of 512 tokens of SmolLM2-135M in fp32: 32 blocks of 737,280 bytes. A child process owns the blocks, this
one pulls them into its own region, each on a core of its own where there are two. Before each measurement a buffer larger
than most caches is read through, so that neither the copy nor the memcpy finds its bytes in a cache. Medians of `--repeats`;
`total` is a whole pull as the event loop sees it, copy and checksum are the copy thread's parts of it. Idle CPU is that of
each process over two quiet seconds, connected, in cores.
"""

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import secrets
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from typing import cast

import msgspec
import numpy as np

from common.adapters.kv_copying import TransferRecord
from common.adapters.kv_region import AnonymousMemory, MappedKvRegion, create_region, region_size
from common.adapters.kv_transport import NETWORK_TIERS, build_kv_transport
from common.ports.kv_transport import BlockSource, KvLink, Tier
from common.values.errors import SegueError
from common.values.ids import ReservationId
from common.values.kv_layout import KvLayout

SMOLLM2 = KvLayout(layers=30, kv_heads=3, head_dim=64, block_size=16, dtype="float32")
EVICTION_BYTES = 128 << 20
IDLE_S = 2.0
WARM_UPS = 3


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What the child says once its blocks are sealed and granted; block b has generation 0."""

    offer: bytes
    reservation: bytes
    checksums: list[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class TierFigures:
    """Medians, in milliseconds; the shares are the speeds of the copy and of the whole pull as parts of memcpy's.

    `best_copy_share` compares the quickest copy with the quickest memcpy: on a machine that does other work besides, it is
    the steadier figure. On the tiers that send messages the copy is only the last of several, out of a buffer that is in
    the cache: no share.
    """

    tier: Tier
    blocks: int
    megabytes: float
    total_ms: float
    copy_ms: float
    checksum_ms: float
    memcpy_ms: float
    copy_share: float | None
    best_copy_share: float | None
    pull_share: float
    idle_cores_here: float
    idle_cores_there: float


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 where a tier that was asked for could not be measured."""
    options = _parse(argv)
    if options.serve:
        asyncio.run(_serve(options.serve, options.blocks))
        return 0
    blocks = SMOLLM2.blocks_for(options.tokens)
    figures: list[TierFigures] = []
    failures: dict[str, str] = {}
    for tier in cast("list[Tier]", options.tiers):
        try:
            figures.append(asyncio.run(_measure(tier, blocks, options.repeats)))
        except SegueError as error:
            failures[tier] = str(error)
    _print_table(figures, failures, options.tokens)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"tokens": options.tokens, "tiers": [asdict(f) for f in figures], "failures": failures}, file, indent=2)
    return 1 if failures else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_transfer", description="Measure the KV transfer, tier by tier.")
    parser.add_argument("--tiers", type=lambda text: text.split(","), default=list(NETWORK_TIERS), help="such as shm,tcp")
    parser.add_argument("--tokens", type=int, default=512, help="length of the prompt whose blocks are pulled")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--json", help="write the figures to this file too")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--blocks", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.tokens < 1 or options.repeats < 1:
        parser.error("--tokens and --repeats are at least 1")
    return options


async def _serve(tier: Tier, blocks: int) -> None:
    """The child: own the blocks, say what they are, and wait until standard input ends."""
    _pin(-1)
    transport = build_kv_transport([tier], "127.0.0.1")
    region = await transport.start(SMOLLM2, blocks)
    assert isinstance(region, MappedKvRegion)
    reservation = ReservationId(secrets.token_bytes(16))
    random = np.random.default_rng(0)
    checksums = []
    for block in range(blocks):
        region.block_view(block)[:] = random.bytes(SMOLLM2.block_bytes)
        checksums.append(region.seal(block, valid_positions=SMOLLM2.block_size))
    transport.grant(reservation, dict.fromkeys(range(blocks), 0))
    served = Served(offer=transport.offer(), reservation=reservation, checksums=checksums)
    print(msgspec.json.encode(served).decode(), flush=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()
    await transport.close()


@contextlib.asynccontextmanager
async def _served(tier: Tier, blocks: int) -> AsyncIterator[tuple[int, Served]]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tools.bench_transfer", "--serve", tier, "--blocks", str(blocks)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 24,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = await process.stdout.readline()
        if not line:
            raise SegueError(f"the process that serves {tier} ended: see its error above")
        yield process.pid, msgspec.json.decode(line, type=Served)
    finally:
        process.stdin.close()
        await process.wait()


async def _measure(tier: Tier, blocks: int, repeats: int) -> TierFigures:
    records: list[TransferRecord] = []
    cores = os.sched_getaffinity(0)
    async with _served(tier, blocks) as (child, served):
        _pin(0)
        transport = build_kv_transport([tier], "127.0.0.1", observer=records.append)
        try:
            region = await transport.start(SMOLLM2, blocks)
            link = await transport.connect(served.offer)
            sources = [
                BlockSource(source_block=block, generation=0, checksum=checksum, landing_block=block)
                for block, checksum in enumerate(served.checksums)
            ]
            idle_here, idle_there = await _idle_cores(child)
            copies = await _repeat(link, ReservationId(served.reservation), sources, region.blocks_address, repeats)
        finally:
            await transport.close()
            os.sched_setaffinity(0, cores)
    measured = records[-repeats:]
    copy_s, memcpy_s = statistics.median(r.copy_s for r in measured), statistics.median(copies)
    total_s = statistics.median(r.total_s for r in measured)
    return TierFigures(
        tier=tier,
        blocks=blocks,
        megabytes=blocks * SMOLLM2.block_bytes / 1e6,
        total_ms=1e3 * total_s,
        copy_ms=1e3 * copy_s,
        checksum_ms=1e3 * statistics.median(r.checksum_s for r in measured),
        memcpy_ms=1e3 * memcpy_s,
        copy_share=memcpy_s / copy_s if tier == "shm" else None,
        best_copy_share=min(copies) / min(r.copy_s for r in measured) if tier == "shm" else None,
        pull_share=memcpy_s / total_s,
        idle_cores_here=idle_here,
        idle_cores_there=idle_there,
    )


async def _repeat(link: KvLink, reservation: ReservationId, sources: Sequence[BlockSource], landing: int, repeats: int) -> list[float]:
    """Pull and memcpy in turns; returns the times of the memcpys (the observer has those of the pulls)."""
    blocks, block_bytes = len(sources), SMOLLM2.block_bytes
    memory = AnonymousMemory(region_size(SMOLLM2, blocks))
    other = create_region(memory, SMOLLM2, blocks, bytes(16))
    other.block_view(0)[:] = bytes(block_bytes)
    eviction = np.ones(EVICTION_BYTES, dtype=np.uint8)
    copies = []
    for _ in range(WARM_UPS + repeats):
        int(eviction.sum())
        outcomes = await link.pull(reservation, sources)
        if outcomes != ["copied"] * blocks:
            raise SegueError(f"a pull over {link.tier} ended with {set(outcomes)}")
        int(eviction.sum())
        started = time.perf_counter()
        for block in range(blocks):
            ctypes.memmove(landing + block * block_bytes, other.block_address(block), block_bytes)
        copies.append(time.perf_counter() - started)
    memory.release()
    return copies[WARM_UPS:]


async def _idle_cores(child: int) -> tuple[float, float]:
    """CPU use of this process and the child, in cores, while nothing happens."""
    here, there = time.process_time(), _process_cpu_s(child)
    await asyncio.sleep(IDLE_S)
    return (time.process_time() - here) / IDLE_S, (_process_cpu_s(child) - there) / IDLE_S


def _process_cpu_s(process_id: int) -> float:
    with open(f"/proc/{process_id}/stat", encoding="ascii") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _pin(which: int) -> None:
    """Onto one core, where there is more than one to choose from."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        os.sched_setaffinity(0, {cores[which]})


def _print_table(figures: Sequence[TierFigures], failures: dict[str, str], tokens: int) -> None:
    if figures:
        print(f"{tokens} tokens of SmolLM2-135M in fp32: {figures[0].blocks} blocks, {figures[0].megabytes:.1f} MB; medians")
        shares = "copy at, of memcpy | best copy, of best memcpy | pull at, of memcpy"
        print(f"| tier | total ms | copy ms | checksum ms | memcpy ms | {shares} | idle cores |")
        print("|" + " --- |" * 9)
    for f in figures:
        times = f"{f.total_ms:.2f} | {f.copy_ms:.2f} | {f.checksum_ms:.2f} | {f.memcpy_ms:.2f}"
        copy_share, best = ("" if share is None else f"{share:.0%}" for share in (f.copy_share, f.best_copy_share))
        print(
            f"| {f.tier} | {times} | {copy_share} | {best} | {f.pull_share:.0%} | {f.idle_cores_here:.4f}, {f.idle_cores_there:.4f} |"
        )
    for tier, reason in failures.items():
        print(f"{tier} not measured: {reason}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
