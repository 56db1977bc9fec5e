"""Moving KV blocks between the regions of two workers, on whatever tier the two machines share."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from common.values.ids import ReservationId
from common.values.kv_layout import KvLayout
from common.values.transfer import BlockSource as BlockSource
from common.values.transfer import PullOutcome as PullOutcome
from common.values.transfer import Tier as Tier


class KvRegion(Protocol):
    """This worker's own pool: header, `generation u64[blocks]`, blocks. Allocated by the transport, touched before use,
    so that the first copy pays no page faults. Only its owner ever writes into it."""

    @property
    def layout(self) -> KvLayout: ...
    @property
    def blocks(self) -> int: ...
    @property
    def blocks_address(self) -> int:
        """Address of block 0 in this process; the blocks follow each other without a gap."""
        ...

    @property
    def generations(self) -> memoryview:
        """Format 'Q', one per block. The owner raises a block's entry before the new owner's first write."""
        ...

    def seal(self, block: int, *, valid_positions: int) -> bytes:
        """Zero the positions from `valid_positions` on, then return the 16-byte xxh3_128 of the whole block.

        Blocking (tens of microseconds a block): call it in a thread.
        """
        ...


class KvLink(Protocol):
    """A way to read one peer's region, for the life of the control connection to that peer."""

    @property
    def tier(self) -> Tier: ...

    async def pull(self, reservation: ReservationId, blocks: Sequence[BlockSource]) -> list[PullOutcome]:
        """Copy blocks into the own region; one outcome per block, in order.

        Generations are compared before and after each copy and the checksum on our own bytes. When this returns (or
        raises, or is cancelled) nothing writes into the landing blocks any more.
        """
        ...

    async def close(self) -> None: ...


class KvTransport(Protocol):
    """One per worker process. `start` allocates the region and listens where a tier needs it."""

    async def start(self, layout: KvLayout, blocks: int) -> KvRegion: ...

    def offer(self) -> bytes:
        """What a peer needs to reach this region (addresses, keys, a secret for the data connection). Given to a peer
        only over an authenticated control connection."""
        ...

    async def connect(self, peer_offer: bytes) -> KvLink:
        """Open the best tier that both sides have. Raises PeerError where there is none, naming each tier and why."""
        ...

    def grant(self, reservation: ReservationId, blocks: Mapping[int, int]) -> None:
        """Let the holder of `reservation` pull these blocks (block → generation); adds to what it was granted before.
        Message tiers serve nothing else. On the mapped tier the generations alone fence."""
        ...

    def revoke(self, reservation: ReservationId) -> None: ...

    async def broken(self) -> str:
        """Returns, with the reason, once this transport has failed as a whole, not for one peer; else never. Its pulls are lost, the
        region stays. Only another process helps."""
        ...

    async def close(self) -> None: ...
