"""A worker's KV pool in a process of its own, driven line by line, for the tests that need two processes.

Each line in is a JSON list [command, arguments…], each line out its JSON result. The same commands, called directly, drive a
pool inside the test's process, so that one test body serves every tier.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from common.adapters.kv_region import MappedKvRegion
from common.adapters.kv_transport import UcxOrTcpTransport
from common.adapters.memory_transport import MemoryTransport, MemoryTransportHub
from common.ports.kv_transport import KvTransport, Tier
from common.values.ids import ReservationId
from common.values.kv_layout import KvLayout

ROOT = Path(__file__).resolve().parents[2]


class PoolOwner:
    """The owner's side: fills blocks with bytes that follow from a seed, seals them, grants them, takes them away."""

    def __init__(self, transport: KvTransport, region: MappedKvRegion) -> None:
        self._transport = transport
        self._region = region

    def offer(self) -> str:
        return self._transport.offer().hex()

    def fill(self, block: int, seed: int, valid_positions: int) -> str:
        size = self._region.layout.block_bytes
        self._region.block_view(block)[:] = block_bytes(seed, size)
        return self._region.seal(block, valid_positions=valid_positions).hex()

    def raise_generation(self, block: int) -> int:
        self._region.generations[block] += 1
        return self._region.generations[block]

    def churn(self, block: int, seconds: float) -> None:
        """For a while, give the block to one request after another. An odd generation is being written, an even one is sealed:
        its bytes follow from its generation."""
        contents = [block_bytes(seed, self._region.layout.block_bytes) for seed in range(2)]

        def rewrite() -> None:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                self._region.generations[block] += 1
                self._region.block_view(block)[:] = contents[(self._region.generations[block] + 1) // 2 % 2]
                self._region.generations[block] += 1
                time.sleep(1e-4)

        threading.Thread(target=rewrite, daemon=True).start()

    def flip(self, block: int) -> None:
        self._region.block_view(block)[-1] ^= 1

    def grant(self, reservation: str, blocks: list[tuple[int, int]]) -> None:
        self._transport.grant(ReservationId(bytes.fromhex(reservation)), dict(blocks))

    def revoke(self, reservation: str) -> None:
        self._transport.revoke(ReservationId(bytes.fromhex(reservation)))


def block_bytes(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


class Owner(Protocol):
    """A `PoolOwner`, here or elsewhere."""

    async def call(self, command: str, *arguments: Any) -> Any: ...
    async def die(self) -> None: ...


class OwnerHere:
    def __init__(self, owner: PoolOwner, transport: KvTransport) -> None:
        self._owner = owner
        self._transport = transport

    async def call(self, command: str, *arguments: Any) -> Any:
        return getattr(self._owner, command)(*arguments)

    async def die(self) -> None:
        await self._transport.close()


class OwnerElsewhere:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def call(self, command: str, *arguments: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([command, *arguments]).encode() + b"\n")
        async with asyncio.timeout(30):
            line = await self.process.stdout.readline()
        assert line, "the peer process is gone"
        return json.loads(line)

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    async def die(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()


@contextlib.asynccontextmanager
async def owner_elsewhere(tiers: Sequence[Tier], layout: KvLayout, blocks: int) -> AsyncIterator[OwnerElsewhere]:
    """A pool in a new process, killed at the end."""
    shape = json.dumps([layout.layers, layout.kv_heads, layout.head_dim, layout.block_size, layout.dtype, blocks])
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        ",".join(tiers),
        shape,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    owner = OwnerElsewhere(process)
    try:
        yield owner
    finally:
        await owner.die()
        cast("asyncio.StreamWriter", process.stdin).close()


@contextlib.asynccontextmanager
async def owner_here(hub: MemoryTransportHub, layout: KvLayout, blocks: int) -> AsyncIterator[OwnerHere]:
    transport = MemoryTransport(hub)
    region = await transport.start(layout, blocks)
    assert isinstance(region, MappedKvRegion)
    owner = OwnerHere(PoolOwner(transport, region), transport)
    try:
        yield owner
    finally:
        await owner.die()


async def serve(tiers: Sequence[Tier], layout: KvLayout, blocks: int) -> None:
    """The child: commands from standard input until it ends."""
    transport = UcxOrTcpTransport(tiers=tiers, host="127.0.0.1")
    region = await transport.start(layout, blocks)
    assert isinstance(region, MappedKvRegion)
    owner = PoolOwner(transport, region)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        command, *arguments = json.loads(line)
        print(json.dumps(getattr(owner, command)(*arguments)), flush=True)
    await transport.close()


if __name__ == "__main__":
    layers, kv_heads, head_dim, block_size, dtype, count = json.loads(sys.argv[2])
    shape = KvLayout(layers=layers, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype)
    asyncio.run(serve(cast("list[Tier]", sys.argv[1].split(",")), shape, count))
