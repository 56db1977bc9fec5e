"""The transport of a worker: one region, and for each peer the best tier that both sides have.

Tiers are tried in the order of preference; the one that was taken and why the others were not is logged at each connect.
Where libucp is missing the region is anonymous memory and tcp serves; a region that UCX allocated serves tcp as well.
Close it only when the engine has stopped: the region's memory goes with it.
"""

import asyncio
import logging
import secrets
from collections.abc import Mapping, Sequence

from common.adapters.kv_copy_thread import CopyThread
from common.adapters.kv_copying import TransferObserver, TransferRecord
from common.adapters.kv_grants import KvGrants
from common.adapters.kv_messages import TransportOffer, decode, encode
from common.adapters.kv_region import INCARNATION_BYTES, AnonymousMemory, MappedKvRegion, create_region, region_size
from common.adapters.kv_tier import KvTier, LocalPool, PeerShape, TierLink
from common.adapters.shm_transport import ShmTier
from common.adapters.tcp_transport import TcpTier
from common.adapters.ucp_library import UcpMemory
from common.adapters.ucx_runtime import UcxRuntime
from common.adapters.ucx_transport import UcxTier
from common.ports.kv_transport import KvLink, KvRegion, KvTransport, Tier
from common.values.errors import PeerError, SettingsError
from common.values.ids import ReservationId
from common.values.kv_layout import KvLayout

STALL_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 5.0
NETWORK_TIERS: tuple[Tier, ...] = ("shm", "ucx", "tcp")


def build_kv_transport(
    tiers: Sequence[Tier],
    host: str,
    *,
    data_port: int = 0,
    ucx_port_range: str | None = None,
    observer: TransferObserver | None = None,
) -> KvTransport:
    """The transport of a process that has peers in others.

    `host` is the address that peers reach this worker at; sockets are bound to it. `data_port` is the tcp tier's (0: any),
    `ucx_port_range` UCX's, such as "20000-20100". `observer` is called on the event loop with each pull's times.
    """
    return UcxOrTcpTransport(tiers=tiers, host=host, data_port=data_port, ucx_port_range=ucx_port_range, observer=observer)


class UcxOrTcpTransport:
    """See the module. `unavailable` says, tier by tier, why one that was asked for is not there."""

    def __init__(
        self,
        *,
        tiers: Sequence[Tier] = NETWORK_TIERS,
        host: str,
        data_port: int = 0,
        ucx_port_range: str | None = None,
        observer: TransferObserver | None = None,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        unknown = [tier for tier in tiers if tier not in NETWORK_TIERS]
        if unknown or not tiers:
            raise SettingsError(f"KV tiers are one or more of {', '.join(NETWORK_TIERS)}, not {', '.join(unknown) or 'none'}")
        self._wanted = tuple(tiers)
        self._host = host
        self._data_port = data_port
        self._runtime = UcxRuntime(host, ucx_port_range)
        self._observer = observer
        self._timeouts = (stall_timeout_s, connect_timeout_s)
        self._copies = CopyThread()
        self._grants = KvGrants()
        self._identity = secrets.token_bytes(INCARNATION_BYTES)
        self._memory: AnonymousMemory | None = None
        self._region: MappedKvRegion | None = None
        self._ucx_runs = False
        self._ucx_tier: UcxTier | None = None
        self._tiers: dict[Tier, KvTier] = {}
        self._links: list[TierLink] = []
        self.unavailable: dict[Tier, str] = {}

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """The tiers that came up."""
        return tuple(self._tiers)

    @property
    def strangers(self) -> int:
        """Who came to the message tiers without knowing their secret, or broke their protocol."""
        return sum(part.strangers for part in self._tiers.values())

    async def start(self, layout: KvLayout, blocks: int) -> KvRegion:
        try:
            return await self._start(layout, blocks)
        except BaseException:
            await self.close()
            raise

    async def _start(self, layout: KvLayout, blocks: int) -> KvRegion:
        memory = await self._allocate(region_size(layout, blocks))
        self._region = await self._copies.run(lambda: create_region(memory, layout, blocks, self._identity))
        pool = LocalPool(
            identity=self._identity,
            region=self._region,
            grants=self._grants,
            copies=self._copies,
            observe=self._observe,
            stall_timeout_s=self._timeouts[0],
            connect_timeout_s=self._timeouts[1],
        )
        for tier in self._wanted:
            match tier:
                case "shm" if isinstance(memory, UcpMemory):
                    self._tiers["shm"] = ShmTier(pool, self._runtime, memory)
                case "ucx" if self._ucx_runs:
                    self._ucx_tier = self._tiers["ucx"] = UcxTier(pool, self._runtime)
                    self._ucx_tier.start()
                case "tcp":
                    tcp = TcpTier(pool, self._host, self._data_port)
                    self._tiers["tcp"] = tcp
                    await tcp.start()
                case _:
                    continue
        if not self._tiers:
            raise SettingsError(f"no KV tier can be had: {_reasons(self.unavailable)}")
        return self._region

    async def _allocate(self, size: int) -> UcpMemory | AnonymousMemory:
        """The region's memory: UCX's where a tier wants it and UCX is there, else our own."""
        if "shm" in self._wanted or "ucx" in self._wanted:
            try:
                await self._runtime.start()
                self._ucx_runs = True
                if "shm" in self._wanted:
                    return await self._runtime.allocate(size)
            except (PeerError, SettingsError) as error:
                lacking: tuple[Tier, ...] = ("shm",) if self._ucx_runs else ("shm", "ucx")
                self.unavailable.update({tier: str(error) for tier in lacking if tier in self._wanted})
                logging.getLogger(__name__).warning("kv tiers unavailable", extra={"tiers": lacking, "reason": str(error)})
        self._memory = AnonymousMemory(size)
        return self._memory

    def offer(self) -> bytes:
        region = self._started()
        tiers: dict[str, bytes] = {tier: part.offer() for tier, part in self._tiers.items()}
        return encode(TransportOffer(transport=self._identity, layout=region.layout, blocks=region.blocks, tiers=tiers))

    async def connect(self, peer_offer: bytes) -> KvLink:
        region = self._started()
        offer = decode(peer_offer, TransportOffer)
        if offer.layout != region.layout:
            raise PeerError(f"the peer's KV layout differs: {offer.layout} there, {region.layout} here")
        shape = PeerShape(identity=offer.transport, layout=offer.layout, blocks=offer.blocks)
        failed: dict[Tier, str] = {}
        for tier in self._wanted:
            if tier not in self._tiers:
                failed[tier] = self.unavailable.get(tier, "not available here")
            elif tier not in offer.tiers:
                failed[tier] = "not offered by the peer"
            else:
                try:
                    link = await self._tiers[tier].connect(shape, offer.tiers[tier])
                except PeerError as error:
                    failed[tier] = str(error)
                    continue
                self._links = [*(known for known in self._links if not known.closed), link]
                fields = {"tier": tier, "peer": offer.transport.hex(), "failed": failed}
                logging.getLogger(__name__).info("kv link opened: %s", tier, extra=fields)
                return link
        raise PeerError(f"no KV tier reaches the peer: {_reasons(failed)}")

    def grant(self, reservation: ReservationId, blocks: Mapping[int, int]) -> None:
        self._grants.grant(reservation, blocks)

    def revoke(self, reservation: ReservationId) -> None:
        self._grants.revoke(reservation)

    async def broken(self) -> str:
        return await self._runtime.broken() if self._ucx_runs else await asyncio.get_running_loop().create_future()

    async def close(self) -> None:
        """Links, tiers, UCX, memory, thread, in this order; each step only once the one before is over."""
        for link in self._links:
            await link.close()
        self._links.clear()
        for part in self._tiers.values():
            await part.close()
        self._tiers.clear()
        if self._ucx_runs:
            self._ucx_runs = False
            await self._runtime.close()
        if self._ucx_tier is not None:
            self._ucx_tier.free()
            self._ucx_tier = None
        if self._memory is not None:
            self._memory.release()
            self._memory = None
        self._region = None
        await self._copies.close()

    def _started(self) -> MappedKvRegion:
        if self._region is None:
            raise RuntimeError("the transport has not been started")
        return self._region

    def _observe(self, record: TransferRecord) -> None:
        if self._observer is not None:
            self._observer(record)


def _reasons(failed: Mapping[Tier, str]) -> str:
    return "; ".join(f"{tier}: {reason}" for tier, reason in failed.items()) or "none was configured"
