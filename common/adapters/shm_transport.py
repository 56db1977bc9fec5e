"""The tier of one host: the peer's region is mapped, read-only, and its blocks are copied once, by us.

The peer's process does nothing for it, and may even be dead: what was mapped stays readable, so blocks whose READY has
arrived can still be taken over. The generation words in the mapping are the fence: they are compared before and after each
copy. The key and address come over the authenticated control connection, and the region's header is checked before use.
"""

import asyncio
import ctypes
import mmap
from collections.abc import Sequence

from common.adapters.kv_copying import check_landing, copy_mapped
from common.adapters.kv_messages import ShmOffer, decode, encode
from common.adapters.kv_region import MappedKvRegion, attach_region, region_size, touch_for_reading
from common.adapters.kv_staging import pull_in_batches
from common.adapters.kv_tier import LocalPool, PeerShape, PullMeter, TierLink
from common.adapters.ucp_library import UcpError, UcpMemory
from common.adapters.ucx_runtime import UcxRuntime
from common.ports.kv_transport import BlockSource, PullOutcome, Tier
from common.values.errors import PeerError
from common.values.ids import ReservationId

BATCH_BYTES = 16 << 20


class ShmTier:
    """Lets peers of this host map our region, and maps theirs."""

    tier: Tier = "shm"

    def __init__(self, pool: LocalPool, runtime: UcxRuntime, memory: UcpMemory) -> None:
        self._pool = pool
        self._runtime = runtime
        self._memory = memory

    @property
    def strangers(self) -> int:
        """Nobody asks this process for anything on this tier."""
        return 0

    def offer(self) -> bytes:
        offer = ShmOffer(
            worker_address=self._runtime.worker_address,
            remote_key=self._memory.remote_key,
            region_address=self._memory.address,
            region_bytes=self._memory.size,
        )
        return encode(offer)

    async def connect(self, shape: PeerShape, offer: bytes) -> TierLink:
        there = decode(offer, ShmOffer)
        if there.region_bytes != region_size(shape.layout, shape.blocks):
            raise PeerError("the peer's region is not of the size that its shape says")
        endpoint = await self._runtime.endpoints.acquire(shape.identity, there.worker_address)
        try:
            key, address = await self._runtime.driver.map_remote(endpoint, there.remote_key, there.region_address)
        except BaseException as error:
            self._runtime.endpoints.release(shape.identity, endpoint)
            if isinstance(error, UcpError):
                raise PeerError(f"the peer's memory cannot be mapped here (another host or container?): {error}") from error
            raise
        link = ShmLink(self._pool, self._runtime, shape.identity, endpoint, key)
        try:
            await link.attach(address, shape, there.region_bytes)
        except BaseException:
            await link.close()
            raise
        return link

    async def close(self) -> None:
        """Nothing of its own: the runtime owns the memory."""


class ShmLink:
    """A mapped peer region."""

    tier: Tier = "shm"

    def __init__(self, pool: LocalPool, runtime: UcxRuntime, peer: bytes, endpoint: int, key: int) -> None:
        self._pool = pool
        self._runtime = runtime
        self._peer = peer
        self._endpoint = endpoint
        self._key: int | None = key
        self._region: MappedKvRegion | None = None
        self._turn = asyncio.Lock()

    @property
    def closed(self) -> bool:
        return self._key is None

    async def attach(self, address: int, shape: PeerShape, size: int) -> None:
        """Protect the mapping, check that it is the region meant, and touch its pages. Raises PeerError."""
        protect_from_writing(address, size)
        region = attach_region(address, shape.layout, shape.blocks, shape.identity)
        await self._pool.copies.run(lambda: touch_for_reading(address, size))
        self._region = region

    async def pull(self, reservation: ReservationId, blocks: Sequence[BlockSource]) -> list[PullOutcome]:
        check_landing(self._pool.region, blocks)
        meter = PullMeter("shm", self._pool)

        async def pull_batch(batch: Sequence[BlockSource]) -> list[PullOutcome]:
            async with self._turn:
                region = self._region
                if region is None:
                    return ["lost"] * len(batch)
                return meter.add(await self._pool.copies.run(lambda: copy_mapped(region, self._pool.region, batch)))

        batch_blocks = max(1, BATCH_BYTES // self._pool.region.layout.block_bytes)
        return meter.finish(await pull_in_batches(blocks, batch_blocks, pull_batch, in_flight=1))

    async def close(self) -> None:
        """Waits for a copy that is under way: nothing may read the mapping once it is gone."""
        async with self._turn:
            self._region = None
            key, self._key = self._key, None
            if key is not None:
                await self._runtime.driver.unmap_remote(key)
                self._runtime.endpoints.release(self._peer, self._endpoint)


def protect_from_writing(address: int, size: int) -> None:
    """Make the mapping read-only: a bug of ours must not write into a peer's pool. It also proves that all of it is mapped."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if libc.mprotect(address, size, mmap.PROT_READ) != 0:
        raise PeerError(f"the mapping of the peer's region cannot be made read-only: errno {ctypes.get_errno()}")
