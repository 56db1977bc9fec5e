"""The laws of every KV transport: one body, every tier, and two real processes wherever the tier connects processes."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from common.adapters.kv_region import MappedKvRegion
from common.adapters.kv_transport import UcxOrTcpTransport
from common.adapters.memory_transport import MemoryTransport, MemoryTransportHub
from common.ports.kv_transport import BlockSource, KvLink, KvTransport, PullOutcome, Tier
from common.values.errors import PeerError
from common.values.ids import ReservationId
from common.values.kv_layout import KvLayout
from tests.contract.kv_peer import Owner, block_bytes, owner_elsewhere, owner_here

LAYOUT = KvLayout(layers=3, kv_heads=2, head_dim=32, block_size=16)
BIG_LAYOUT = KvLayout(layers=30, kv_heads=3, head_dim=64, block_size=16)
BLOCKS = 64
UCX = pytest.mark.ucx
TIERS = ["memory", "tcp", pytest.param("shm", marks=UCX), pytest.param("ucx", marks=UCX)]


@dataclass(kw_only=True)
class Pair:
    """An owner of blocks, and a receiver with a link to it."""

    owner: Owner
    transport: KvTransport
    region: MappedKvRegion
    link: KvLink
    reservation: ReservationId

    async def seal(self, blocks: Sequence[int], *, valid_positions: int | None = None) -> list[BlockSource]:
        """Fill blocks at the owner (block b from seed b), grant them, and name landing blocks in reverse order."""
        positions = LAYOUT.block_size if valid_positions is None else valid_positions
        sources = []
        for index, block in enumerate(blocks):
            generation = await self.owner.call("raise_generation", block)
            checksum = await self.owner.call("fill", block, block, positions)
            landing = self.region.blocks - 1 - index
            sources.append(
                BlockSource(source_block=block, generation=generation, checksum=bytes.fromhex(checksum), landing_block=landing)
            )
        await self.grant(sources)
        return sources

    async def grant(self, sources: Sequence[BlockSource]) -> None:
        blocks = [[source.source_block, source.generation] for source in sources]
        await self.owner.call("grant", self.reservation.hex(), blocks)

    async def pull(self, sources: Sequence[BlockSource]) -> list[PullOutcome]:
        async with asyncio.timeout(30):
            return await self.link.pull(self.reservation, sources)

    def landed(self, source: BlockSource) -> bytes:
        return bytes(self.region.block_view(source.landing_block))


@contextlib.asynccontextmanager
async def pair(tier: Tier, layout: KvLayout = LAYOUT, blocks: int = BLOCKS) -> AsyncIterator[Pair]:
    hub = MemoryTransportHub()
    transport: KvTransport = MemoryTransport(hub) if tier == "memory" else UcxOrTcpTransport(tiers=[tier], host="127.0.0.1")
    elsewhere = owner_here(hub, layout, blocks) if tier == "memory" else owner_elsewhere([tier], layout, blocks)
    async with elsewhere as owner:
        region = await transport.start(layout, blocks)
        assert isinstance(region, MappedKvRegion)
        try:
            link = await transport.connect(bytes.fromhex(await owner.call("offer")))
            assert link.tier == tier
            reservation = ReservationId(secrets.token_bytes(16))
            yield Pair(owner=owner, transport=transport, region=region, link=link, reservation=reservation)
        finally:
            await transport.close()


@pytest.mark.parametrize("tier", TIERS)
async def test_bytes_arrive_bit_exact_in_any_order_and_number(tier: Tier) -> None:
    async with pair(tier) as two:
        sources = await two.seal([0, 1, 2, 3, 9, 8, 40, BLOCKS - 1])
        assert await two.pull(sources) == ["copied"] * len(sources)
        for source in sources:
            assert two.landed(source) == block_bytes(source.source_block, LAYOUT.block_bytes)
        assert await two.pull([]) == []
        assert await two.pull(sources[2:3]) == ["copied"]


@pytest.mark.parametrize("tier", TIERS)
async def test_a_pull_of_many_messages_arrives_bit_exact(tier: Tier) -> None:
    async with pair(tier, BIG_LAYOUT, 40) as two:
        sources = await two.seal(range(32))
        assert await two.pull(sources) == ["copied"] * 32
        assert all(two.landed(s) == block_bytes(s.source_block, BIG_LAYOUT.block_bytes) for s in sources)


@pytest.mark.parametrize("tier", TIERS)
async def test_the_tail_of_a_sealed_block_is_zero(tier: Tier) -> None:
    async with pair(tier) as two:
        (source,) = await two.seal([7], valid_positions=5)
        assert await two.pull([source]) == ["copied"]
        heads = np.frombuffer(two.landed(source), dtype=np.uint8).reshape(-1, LAYOUT.block_size, LAYOUT.head_dim * 4)
        filled = np.frombuffer(block_bytes(7, LAYOUT.block_bytes), dtype=np.uint8).reshape(heads.shape)
        assert not heads[:, 5:].any()
        assert (heads[:, :5] == filled[:, :5]).all()


@pytest.mark.parametrize("tier", ["memory", "tcp", pytest.param("ucx", marks=UCX)])
async def test_only_granted_blocks_are_served_to_the_holder_of_the_reservation(tier: Tier) -> None:
    async with pair(tier) as two:
        sources = await two.seal([1, 2, 3])
        stranger = ReservationId(secrets.token_bytes(16))
        assert await two.link.pull(stranger, sources) == ["refused"] * 3
        await two.owner.call("revoke", two.reservation.hex())
        assert await two.pull(sources) == ["refused"] * 3
        await two.grant(sources[:1])
        assert await two.pull(sources) == ["copied", "refused", "refused"]
        await two.grant(sources[2:])
        assert await two.pull(sources) == ["copied", "refused", "copied"]


@pytest.mark.parametrize("tier", TIERS)
async def test_blocks_that_the_peer_does_not_have_are_refused(tier: Tier) -> None:
    async with pair(tier) as two:
        beyond = BlockSource(source_block=BLOCKS, generation=0, checksum=bytes(16), landing_block=0)
        await two.owner.call("grant", two.reservation.hex(), [[BLOCKS, 0]])
        assert await two.pull([beyond]) == ["refused"]


@pytest.mark.parametrize("tier", TIERS)
async def test_a_block_given_to_another_request_is_noticed(tier: Tier) -> None:
    async with pair(tier) as two:
        sources = await two.seal([4, 5, 6])
        await two.owner.call("raise_generation", 5)
        assert await two.pull(sources) == ["copied", "generation", "copied"]


@pytest.mark.parametrize("tier", TIERS)
async def test_flipped_bytes_fail_their_checksum(tier: Tier) -> None:
    async with pair(tier) as two:
        sources = await two.seal([4, 5, 6])
        await two.owner.call("flip", 6)
        assert await two.pull(sources) == ["copied", "copied", "checksum"]


@pytest.mark.parametrize("tier", TIERS)
async def test_a_landing_block_that_is_not_ours_is_our_own_bug(tier: Tier) -> None:
    async with pair(tier) as two:
        (source,) = await two.seal([4])
        outside = BlockSource(source_block=4, generation=source.generation, checksum=source.checksum, landing_block=two.region.blocks)
        with pytest.raises(IndexError):
            await two.pull([outside])


@pytest.mark.parametrize("tier", TIERS)
async def test_after_a_cancelled_pull_nothing_writes_into_its_landing_blocks(tier: Tier) -> None:
    async with pair(tier, BIG_LAYOUT, 40) as two:
        sources = await two.seal(range(32))
        for turns in range(0, 60, 6):
            pulling = asyncio.create_task(two.link.pull(two.reservation, sources))
            for _ in range(turns):
                await asyncio.sleep(0)
            pulling.cancel()
            await asyncio.gather(pulling, return_exceptions=True)
            for source in sources:
                two.region.block_view(source.landing_block)[:] = bytes(BIG_LAYOUT.block_bytes)
            await two.link.pull(two.reservation, sources[:1])
            assert not any(any(two.landed(source)[:64]) for source in sources[1:])
        assert await two.pull(sources) == ["copied"] * 32


@pytest.mark.parametrize("tier", TIERS)
async def test_several_pulls_at_once_do_not_mix(tier: Tier) -> None:
    async with pair(tier) as two:
        sources = await two.seal(range(24))
        parts = [sources[start : start + 4] for start in range(0, 24, 4)]
        assert await asyncio.gather(*(two.pull(part) for part in parts)) == [["copied"] * 4] * 6
        assert all(two.landed(s) == block_bytes(s.source_block, LAYOUT.block_bytes) for s in sources)


@pytest.mark.parametrize("tier", ["memory", "tcp", pytest.param("ucx", marks=UCX)])
async def test_a_dead_peer_is_lost(tier: Tier) -> None:
    async with pair(tier) as two:
        sources = await two.seal([1, 2])
        assert await two.pull(sources) == ["copied"] * 2
        await two.owner.die()
        assert await two.pull(sources) == ["lost"] * 2


@pytest.mark.ucx
async def test_a_dead_peers_mapped_region_stays_readable() -> None:
    async with pair("shm") as two:
        sources = await two.seal([1, 2])
        await two.owner.die()
        assert await two.pull(sources) == ["copied"] * 2
        assert all(two.landed(s) == block_bytes(s.source_block, LAYOUT.block_bytes) for s in sources)


@pytest.mark.parametrize("tier", TIERS)
async def test_a_closed_link_says_lost_and_a_new_one_works(tier: Tier) -> None:
    async with pair(tier) as two:
        sources = await two.seal([1])
        await two.link.close()
        await two.link.close()
        assert await two.pull(sources) == ["lost"]
        again = await two.transport.connect(bytes.fromhex(await two.owner.call("offer")))
        assert await again.pull(two.reservation, sources) == ["copied"]


@pytest.mark.parametrize("tier", TIERS)
async def test_another_layout_and_garbage_are_refused(tier: Tier) -> None:
    async with pair(tier) as two:
        hub = MemoryTransportHub()
        other: KvTransport = MemoryTransport(hub) if tier == "memory" else UcxOrTcpTransport(tiers=[tier], host="127.0.0.1")
        await other.start(BIG_LAYOUT, 2)
        try:
            with pytest.raises(PeerError, match="layout"):
                await other.connect(bytes.fromhex(await two.owner.call("offer")))
            with pytest.raises(PeerError):
                await two.transport.connect(b"\x93garbage")
        finally:
            await other.close()
