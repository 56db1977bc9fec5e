"""Peers that freeze, die in the middle, or are strangers: the survivor goes on, and says what happened to each block."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator

import msgspec
import pytest

from common.adapters.kv_messages import TcpOffer, TransportOffer, UcxOffer
from common.adapters.kv_transport import UcxOrTcpTransport
from common.ports.kv_transport import BlockSource, KvLink, Tier
from common.values.errors import PeerError
from common.values.ids import ReservationId
from common.values.kv_layout import KvLayout
from tests.contract.kv_peer import OwnerElsewhere, owner_elsewhere

LAYOUT = KvLayout(layers=30, kv_heads=3, head_dim=64)
RESERVATION = ReservationId(b"r" * 16)
BLOCKS = 32
UCX = pytest.mark.ucx


@contextlib.asynccontextmanager
async def linked(tier: Tier) -> AsyncIterator[tuple[OwnerElsewhere, KvLink, list[BlockSource]]]:
    """An owner in another process with 24 granted blocks, and a link that gives up on silence soon."""
    transport = UcxOrTcpTransport(tiers=[tier], host="127.0.0.1", stall_timeout_s=0.5, connect_timeout_s=2.0)
    async with owner_elsewhere([tier], LAYOUT, BLOCKS) as owner:
        await transport.start(LAYOUT, BLOCKS)
        try:
            link = await transport.connect(bytes.fromhex(await owner.call("offer")))
            checksums = [bytes.fromhex(await owner.call("fill", block, block, 16)) for block in range(24)]
            await owner.call("grant", RESERVATION.hex(), [[block, 0] for block in range(24)])
            sources = [
                BlockSource(source_block=block, generation=0, checksum=checksum, landing_block=block)
                for block, checksum in enumerate(checksums)
            ]
            yield owner, link, sources
        finally:
            await transport.close()


@pytest.mark.parametrize("tier", ["tcp", pytest.param("ucx", marks=UCX)])
async def test_a_frozen_peer_is_given_up(tier: Tier) -> None:
    async with linked(tier) as (owner, link, sources):
        owner.freeze()
        assert await link.pull(RESERVATION, sources) == ["lost"] * len(sources)


@pytest.mark.ucx
async def test_a_frozen_peers_mapped_blocks_can_still_be_taken() -> None:
    async with linked("shm") as (owner, link, sources):
        owner.freeze()
        assert await link.pull(RESERVATION, sources) == ["copied"] * len(sources)


@pytest.mark.parametrize("tier", ["tcp", pytest.param("shm", marks=UCX), pytest.param("ucx", marks=UCX)])
async def test_a_peer_killed_between_and_within_pulls_costs_blocks_and_nothing_else(tier: Tier) -> None:
    for delay_s in (0.001, 0.006):
        async with linked(tier) as (owner, link, sources):
            pulling = asyncio.create_task(link.pull(RESERVATION, sources))
            await asyncio.sleep(delay_s)
            await owner.die()
            assert set(await pulling) <= {"copied", "lost"}
            expected = "copied" if tier == "shm" else "lost"
            assert await link.pull(RESERVATION, sources) == [expected] * len(sources)


@pytest.mark.parametrize("tier", ["tcp", pytest.param("ucx", marks=UCX)])
async def test_whoever_does_not_know_the_offers_secret_gets_no_link(tier: Tier) -> None:
    served = UcxOrTcpTransport(tiers=[tier], host="127.0.0.1")
    stranger = UcxOrTcpTransport(tiers=[tier], host="127.0.0.1", connect_timeout_s=0.5)
    await served.start(LAYOUT, 2)
    await stranger.start(LAYOUT, 2)
    try:
        with pytest.raises(PeerError):
            await stranger.connect(_with_another_secret(served.offer(), tier))
        assert served.strangers == 1
        link = await stranger.connect(served.offer())
        assert link.tier == tier
    finally:
        await stranger.close()
        await served.close()


async def test_garbage_on_the_data_port_is_closed_and_counted() -> None:
    served = UcxOrTcpTransport(tiers=["tcp"], host="127.0.0.1", connect_timeout_s=0.2)
    await served.start(LAYOUT, 2)
    offer = msgspec.msgpack.decode(msgspec.msgpack.decode(served.offer(), type=TransportOffer).tiers["tcp"], type=TcpOffer)
    try:
        for number, garbage in enumerate((b"GET / HTTP/1.1\r\nHost: somebody.example.org\r\n\r\n", b"slow")):
            reader, writer = await asyncio.open_connection(offer.host, offer.port)
            writer.write(garbage)
            async with asyncio.timeout(20):
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
            writer.close()
            assert served.strangers == number + 1
    finally:
        await served.close()


def _with_another_secret(offer: bytes, tier: Tier) -> bytes:
    whole = msgspec.msgpack.decode(offer, type=TransportOffer)
    part = msgspec.msgpack.decode(whole.tiers[tier], type=TcpOffer if tier == "tcp" else UcxOffer)
    forged = msgspec.structs.replace(part, secret=secrets.token_bytes(32))
    return msgspec.msgpack.encode(msgspec.structs.replace(whole, tiers={tier: msgspec.msgpack.encode(forged)}))


@pytest.mark.ucx
@pytest.mark.parametrize("tier", ["shm", "ucx"])
async def test_a_broken_ucx_thread_is_told_and_nobody_waits_for_it(tier: Tier) -> None:
    """Closing works as ever, and the region stays readable until then: the engine may still write into it."""
    transport = UcxOrTcpTransport(tiers=[tier], host="127.0.0.1")
    region = await transport.start(LAYOUT, BLOCKS)
    async with asyncio.timeout(20), owner_elsewhere([tier], LAYOUT, BLOCKS) as owner:
        link = await transport.connect(bytes.fromhex(await owner.call("offer")))
        checksum = bytes.fromhex(await owner.call("fill", 0, 0, 16))
        await owner.call("grant", RESERVATION.hex(), [[0, 0]])
        transport._runtime.driver._submit(lambda worker: worker.address().undefined)  # type: ignore[attr-defined]
        assert "undefined" in await transport.broken()
        assert len(region.seal(1, valid_positions=3)) == 16
        if tier == "ucx":
            source = BlockSource(source_block=0, generation=0, checksum=checksum, landing_block=0)
            assert await link.pull(RESERVATION, [source]) == ["lost"]
        await transport.close()
