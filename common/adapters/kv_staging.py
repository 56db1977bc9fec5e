"""Bounded buffers for packed messages, and the pipeline of a pull that uses them.

A message lands in a buffer of ours, never in landing blocks: those are written by the copy thread alone. So a receive that was
given up may run on as long as it likes; only its buffer has to wait for it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from common.adapters.kv_messages import blocks_per_message
from common.adapters.kv_region import AnonymousMemory
from common.ports.kv_transport import BlockSource, PullOutcome
from common.values.kv_layout import KvLayout

STATUS_AREA_BYTES = 4096
BATCHES_IN_FLIGHT = 2


def staging_bytes(layout: KvLayout) -> int:
    """One message: an area for statuses, then its blocks."""
    return STATUS_AREA_BYTES + blocks_per_message(layout) * layout.block_bytes


class StagingBuffer:
    """A lent buffer. It goes back to its pool when each holder has released it: the pull, and a receive that writes into it."""

    def __init__(self, pool: "StagingPool", memory: AnonymousMemory) -> None:
        self._pool = pool
        self._memory = memory
        self._holders = 1

    @property
    def address(self) -> int:
        return self._memory.address

    @property
    def size(self) -> int:
        return self._memory.size

    def hold(self) -> None:
        self._holders += 1

    def release(self) -> None:
        self._holders -= 1
        if self._holders == 0:
            self._pool.take_back(self._memory)


class StagingPool:
    """A fixed number of buffers, made when first needed. Serving and pulling have a pool each: neither can starve the other."""

    def __init__(self, buffer_bytes: int, count: int) -> None:
        self._buffer_bytes = buffer_bytes
        self._made: list[AnonymousMemory] = []
        self._free: list[AnonymousMemory] = []
        self._available = asyncio.Semaphore(count)

    async def acquire(self) -> StagingBuffer:
        await self._available.acquire()
        if not self._free:
            memory = AnonymousMemory(self._buffer_bytes)
            self._made.append(memory)
            self._free.append(memory)
        return StagingBuffer(self, self._free.pop())

    def take_back(self, memory: AnonymousMemory) -> None:
        self._free.append(memory)
        self._available.release()

    def close(self) -> None:
        """Give the memory back; nothing may be using a buffer any more."""
        for memory in self._made:
            memory.release()
        self._made.clear()
        self._free.clear()


async def pull_in_batches(
    blocks: Sequence[BlockSource],
    batch_blocks: int,
    pull_batch: Callable[[Sequence[BlockSource]], Awaitable[list[PullOutcome]]],
    in_flight: int = BATCHES_IN_FLIGHT,
) -> list[PullOutcome]:
    """Cut a pull into messages, and fetch one while the one before it is copied and checked."""
    starts = range(0, len(blocks), batch_blocks)
    outcomes: dict[int, list[PullOutcome]] = {}
    remaining = iter(starts)

    async def take_batches() -> None:
        for start in remaining:
            outcomes[start] = await pull_batch(blocks[start : start + batch_blocks])

    async with asyncio.TaskGroup() as group:
        for _ in range(min(in_flight, len(starts))):
            group.create_task(take_batches())
    return [outcome for start in starts for outcome in outcomes[start]]
