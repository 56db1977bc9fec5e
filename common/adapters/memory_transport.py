"""The transport of workers that live in one process: for tests, checked by the same contract as the real ones.

Grants, generations and checksums hold as on any tier; a transport that was closed is a peer that died.
"""

import asyncio
import secrets
from collections.abc import Mapping, Sequence

from common.adapters.kv_copy_thread import CopyThread
from common.adapters.kv_copying import TransferObserver, TransferRecord, pack_blocks
from common.adapters.kv_grants import KvGrants
from common.adapters.kv_messages import FetchRequest, TransportOffer, decode, encode
from common.adapters.kv_region import INCARNATION_BYTES, AnonymousMemory, MappedKvRegion, create_region, region_size
from common.adapters.kv_staging import STATUS_AREA_BYTES, StagingBuffer, StagingPool
from common.adapters.kv_tier import LocalPool, MessagePuller
from common.ports.kv_transport import BlockSource, KvLink, KvRegion, PullOutcome, Tier
from common.values.errors import PeerError
from common.values.ids import ReservationId
from common.values.kv_layout import KvLayout


class MemoryTransportHub:
    """The workers that can reach each other."""

    def __init__(self) -> None:
        self._transports: dict[bytes, MemoryTransport] = {}

    def join(self, identity: bytes, transport: "MemoryTransport") -> None:
        self._transports[identity] = transport

    def leave(self, identity: bytes) -> None:
        self._transports.pop(identity, None)

    def find(self, identity: bytes) -> "MemoryTransport | None":
        return self._transports.get(identity)


class MemoryTransport:
    """One worker's transport on a hub."""

    def __init__(self, hub: MemoryTransportHub, observer: TransferObserver | None = None) -> None:
        self._hub = hub
        self._observer = observer
        self._identity = secrets.token_bytes(INCARNATION_BYTES)
        self._grants = KvGrants()
        self._copies = CopyThread("kv-memory")
        self._memory: AnonymousMemory | None = None
        self._pool: LocalPool | None = None
        self._staging: StagingPool | None = None
        self._broke: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start(self, layout: KvLayout, blocks: int) -> KvRegion:
        memory = self._memory = AnonymousMemory(region_size(layout, blocks))
        region = await self._copies.run(lambda: create_region(memory, layout, blocks, self._identity))
        self._pool = LocalPool(
            identity=self._identity,
            region=region,
            grants=self._grants,
            copies=self._copies,
            observe=self._observe,
            stall_timeout_s=10.0,
            connect_timeout_s=5.0,
        )
        self._staging = self._pool.staging()
        self._hub.join(self._identity, self)
        return region

    def offer(self) -> bytes:
        region = self._started().region
        return encode(TransportOffer(transport=self._identity, layout=region.layout, blocks=region.blocks, tiers={"memory": b""}))

    async def broken(self) -> str:
        return await asyncio.shield(self._broke)

    def break_down(self, reason: str) -> None:
        """What happens to others when their library's thread ends."""
        self._broke.set_result(reason)

    async def connect(self, peer_offer: bytes) -> KvLink:
        pool, staging = self._started(), self._staging
        offer = decode(peer_offer, TransportOffer)
        if offer.layout != pool.region.layout:
            raise PeerError(f"the peer's KV layout differs: {offer.layout} there, {pool.region.layout} here")
        if staging is None or "memory" not in offer.tiers or self._hub.find(offer.transport) is None:
            raise PeerError("no KV tier reaches the peer: memory: not on this hub")
        return MemoryLink(self._hub, offer.transport, pool, staging)

    def grant(self, reservation: ReservationId, blocks: Mapping[int, int]) -> None:
        self._grants.grant(reservation, blocks)

    def revoke(self, reservation: ReservationId) -> None:
        self._grants.revoke(reservation)

    async def serve(self, request: FetchRequest, target_address: int) -> bytes:
        """Pack for a peer, in our own thread. Raises PeerError once closed."""
        region: MappedKvRegion = self._started().region
        granted = self._grants.granted(ReservationId(request.reservation))
        return await self._copies.run(lambda: pack_blocks(region, granted, request.blocks, request.generations, target_address))

    async def close(self) -> None:
        self._hub.leave(self._identity)
        self._pool = None
        await self._copies.close()
        if self._staging is not None:
            self._staging.close()
            self._staging = None
        if self._memory is not None:
            self._memory.release()
            self._memory = None

    def _started(self) -> LocalPool:
        if self._pool is None:
            raise PeerError("the transport is not running")
        return self._pool

    def _observe(self, record: TransferRecord) -> None:
        if self._observer is not None:
            self._observer(record)


class MemoryLink:
    """A peer on the same hub."""

    tier: Tier = "memory"

    def __init__(self, hub: MemoryTransportHub, peer: bytes, pool: LocalPool, staging: StagingPool) -> None:
        self._hub = hub
        self._peer = peer
        self._puller = MessagePuller("memory", pool, staging, self._fetch)
        self._closed = False

    async def pull(self, reservation: ReservationId, blocks: Sequence[BlockSource]) -> list[PullOutcome]:
        return await self._puller.pull(reservation, blocks)

    async def _fetch(self, request: FetchRequest, buffer: StagingBuffer) -> bytes:
        transport = self._hub.find(self._peer)
        if transport is None or self._closed:
            raise PeerError("the peer is lost")
        return await transport.serve(request, buffer.address + STATUS_AREA_BYTES)

    async def close(self) -> None:
        self._closed = True
