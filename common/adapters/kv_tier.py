"""What the tiers of one transport share: the pool they serve and land in, and the pull over a tier that sends messages."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from common.adapters.kv_copy_thread import CopyThread
from common.adapters.kv_copying import Landed, TransferObserver, TransferRecord, check_landing, land_packed
from common.adapters.kv_grants import KvGrants
from common.adapters.kv_messages import FetchRequest, blocks_per_message
from common.adapters.kv_region import MappedKvRegion
from common.adapters.kv_staging import STATUS_AREA_BYTES, StagingBuffer, StagingPool, pull_in_batches, staging_bytes
from common.ports.kv_transport import BlockSource, KvLink, PullOutcome, Tier
from common.values.errors import PeerError
from common.values.ids import ReservationId
from common.values.kv_layout import KvLayout

STAGING_BUFFERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPool:
    """Our side of every link: the region, what is granted out of it, and the thread that copies.

    `stall_timeout_s` bounds the wait for one message (8 MiB) of a peer, `connect_timeout_s` that for a new link.
    """

    identity: bytes
    region: MappedKvRegion
    grants: KvGrants
    copies: CopyThread
    observe: TransferObserver
    stall_timeout_s: float
    connect_timeout_s: float

    def staging(self) -> StagingPool:
        return StagingPool(staging_bytes(self.region.layout), STAGING_BUFFERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerShape:
    """A peer's region as its offer describes it."""

    identity: bytes
    layout: KvLayout
    blocks: int


class TierLink(KvLink, Protocol):
    """A link whose transport can see that it was closed, and forget it."""

    @property
    def closed(self) -> bool: ...


class KvTier(Protocol):
    """One way to move blocks. `offer` is what peers need to use it; `connect` raises PeerError where this way is closed."""

    @property
    def tier(self) -> Tier: ...
    @property
    def strangers(self) -> int: ...
    def offer(self) -> bytes: ...
    async def connect(self, shape: PeerShape, offer: bytes) -> TierLink: ...
    async def close(self) -> None: ...


class PullMeter:
    """Adds up the batches of one pull for the observer."""

    def __init__(self, tier: Tier, pool: LocalPool) -> None:
        self._tier: Tier = tier
        self._pool = pool
        self._started = time.perf_counter()
        self._copy_s = 0.0
        self._checksum_s = 0.0

    def add(self, landed: Landed) -> list[PullOutcome]:
        self._copy_s += landed.copy_s
        self._checksum_s += landed.checksum_s
        return landed.outcomes

    def finish(self, outcomes: list[PullOutcome]) -> list[PullOutcome]:
        counts = Counter(outcomes)
        record = TransferRecord(
            tier=self._tier,
            blocks=len(outcomes),
            bytes_moved=counts["copied"] * self._pool.region.layout.block_bytes,
            total_s=time.perf_counter() - self._started,
            copy_s=self._copy_s,
            checksum_s=self._checksum_s,
            outcomes=counts,
        )
        self._pool.observe(record)
        return outcomes


FetchMessage = Callable[[FetchRequest, StagingBuffer], Awaitable[bytes]]
"""Bring one message into the buffer, packed blocks from STATUS_AREA_BYTES on; returns its statuses, one a block. Raises PeerError
where the peer is lost. It has checked that the message is as long as the statuses say."""


class MessagePuller:
    """Pulls over a tier that sends messages: fetch into a staging buffer, then copy and check in the copy thread."""

    def __init__(self, tier: Tier, pool: LocalPool, staging: StagingPool, fetch: FetchMessage) -> None:
        self._tier: Tier = tier
        self._pool = pool
        self._staging = staging
        self._fetch = fetch

    async def pull(self, reservation: ReservationId, blocks: Sequence[BlockSource]) -> list[PullOutcome]:
        check_landing(self._pool.region, blocks)
        meter = PullMeter(self._tier, self._pool)
        lost = asyncio.Event()

        async def pull_batch(batch: Sequence[BlockSource]) -> list[PullOutcome]:
            if lost.is_set():
                return ["lost"] * len(batch)
            buffer = await self._staging.acquire()
            try:
                return meter.add(await self._pull_message(reservation, batch, buffer))
            except PeerError as error:
                lost.set()
                logging.getLogger(__name__).warning("kv pull lost: %s", error, extra={"tier": self._tier})
                return ["lost"] * len(batch)
            finally:
                buffer.release()

        return meter.finish(await pull_in_batches(blocks, blocks_per_message(self._pool.region.layout), pull_batch))

    async def _pull_message(self, reservation: ReservationId, batch: Sequence[BlockSource], buffer: StagingBuffer) -> Landed:
        request = FetchRequest(
            reservation=reservation,
            blocks=[source.source_block for source in batch],
            generations=[source.generation for source in batch],
        )
        statuses = await self._fetch(request, buffer)
        packed = buffer.address + STATUS_AREA_BYTES
        return await self._pool.copies.run(lambda: land_packed(self._pool.region, batch, statuses, packed))
