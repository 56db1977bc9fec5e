"""Which tier two workers take, that nothing is left behind, and that the mapped tier's fence holds while blocks change hands."""

import asyncio
import os
import secrets
import threading
from pathlib import Path

import pytest

from common.adapters.kv_checksum import checksum_of
from common.adapters.kv_copy_thread import CopyThread
from common.adapters.kv_region import MappedKvRegion
from common.adapters.kv_transport import UcxOrTcpTransport, build_kv_transport
from common.adapters.shm_transport import ShmLink
from common.adapters.ucx_environment import interface_of, prepare_environment
from common.ports.kv_transport import BlockSource, Tier
from common.values.errors import PeerError, SettingsError
from common.values.ids import ReservationId
from common.values.kv_layout import KvLayout
from tests.contract.kv_peer import block_bytes, owner_elsewhere

LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=32)
_MARKED_FOR_DESTRUCTION = 0o1000
WIDE = KvLayout(layers=30, kv_heads=3, head_dim=64)


@pytest.mark.ucx
@pytest.mark.parametrize("tiers", [["shm", "ucx", "tcp"], ["ucx", "shm"], ["tcp", "shm"], ["tcp"]])
async def test_the_first_common_tier_is_taken_whatever_else_the_region_serves(tiers: list[Tier]) -> None:
    async with owner_elsewhere(["shm", "ucx", "tcp"], LAYOUT, 4) as owner:
        transport = build_kv_transport(tiers, "127.0.0.1")
        region = await transport.start(LAYOUT, 4)
        try:
            link = await transport.connect(bytes.fromhex(await owner.call("offer")))
            assert link.tier == tiers[0]
            reservation = ReservationId(secrets.token_bytes(16))
            checksum = bytes.fromhex(await owner.call("fill", 1, 1, 16))
            await owner.call("grant", reservation.hex(), [[1, 0]])
            source = BlockSource(source_block=1, generation=0, checksum=checksum, landing_block=2)
            assert await link.pull(reservation, [source]) == ["copied"]
            assert region.seal(2, valid_positions=16) == checksum
        finally:
            await transport.close()


async def test_without_libucp_tcp_serves_and_the_reason_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGUE_UCX_LIBRARY", "/nowhere/libucp.so.0")
    transport = UcxOrTcpTransport(host="127.0.0.1")
    await transport.start(LAYOUT, 2)
    assert transport.tiers == ("tcp",)
    assert "/nowhere/libucp.so.0" in transport.unavailable["shm"]
    assert "/nowhere/libucp.so.0" in transport.unavailable["ucx"]
    await transport.close()


async def test_no_common_tier_is_a_peer_error_that_names_each_and_why() -> None:
    async with owner_elsewhere(["tcp"], LAYOUT, 2) as owner:
        offer = bytes.fromhex(await owner.call("offer"))
        await owner.die()
        transport = UcxOrTcpTransport(tiers=["tcp"], host="127.0.0.1")
        await transport.start(LAYOUT, 2)
        with pytest.raises(PeerError, match="tcp: no data connection"):
            await transport.connect(offer)
        await transport.close()


@pytest.mark.ucx
async def test_after_closing_nothing_is_left_behind() -> None:
    async def live_once() -> None:
        transport = UcxOrTcpTransport(host="127.0.0.1")
        await transport.start(LAYOUT, 64)
        async with owner_elsewhere(["shm", "ucx", "tcp"], LAYOUT, 64) as owner:
            await transport.connect(bytes.fromhex(await owner.call("offer")))
            await transport.close()

    await live_once()
    before = _belongings()
    for _ in range(3):
        await live_once()
    assert _belongings() == before


@pytest.mark.ucx
async def test_a_killed_owner_leaves_no_shared_memory() -> None:
    before = _shared_memory()
    async with owner_elsewhere(["shm", "ucx", "tcp"], LAYOUT, 64) as owner:
        await owner.call("offer")
    assert _shared_memory() == before


@pytest.mark.ucx
async def test_the_mapping_of_a_peers_region_cannot_be_written() -> None:
    async with owner_elsewhere(["shm"], LAYOUT, 64) as owner:
        transport = UcxOrTcpTransport(tiers=["shm"], host="127.0.0.1")
        await transport.start(LAYOUT, 2)
        link = await transport.connect(bytes.fromhex(await owner.call("offer")))
        assert isinstance(link, ShmLink)
        assert link._region is not None
        assert _protection_at(link._region.block_address(5)).startswith("r--")
        await transport.close()


@pytest.mark.ucx
async def test_a_block_that_changes_hands_while_it_is_copied_is_noticed_before_its_checksum() -> None:
    """The owner raises the generation before it writes, so the generation alone already tells: no checksum ever differs."""
    async with owner_elsewhere(["shm"], WIDE, 2) as owner:
        transport = UcxOrTcpTransport(tiers=["shm"], host="127.0.0.1")
        region = await transport.start(WIDE, 2)
        assert isinstance(region, MappedKvRegion)
        link = await transport.connect(bytes.fromhex(await owner.call("offer")))
        assert isinstance(link, ShmLink)
        assert link._region is not None
        checksums = [checksum_of(block_bytes(seed, WIDE.block_bytes)) for seed in range(2)]
        words = link._region.generations
        await owner.call("churn", 0, 2.0)
        outcomes = set()
        for _ in range(2000):
            generation = words[0]
            if generation and generation % 2 == 0:
                checksum = checksums[generation // 2 % 2]
                source = BlockSource(source_block=0, generation=generation, checksum=checksum, landing_block=1)
                outcomes.update(await link.pull(ReservationId(b""), [source]))
            await asyncio.sleep(0)
        assert outcomes
        assert outcomes <= {"copied", "generation"}
        await transport.close()


async def test_cancelling_waits_for_the_copy_that_runs_and_drops_the_one_that_does_not() -> None:
    thread = CopyThread()
    started, go_on = threading.Event(), threading.Event()
    done: list[str] = []

    def slow() -> None:
        started.set()
        go_on.wait(20)
        done.append("slow")

    running = asyncio.create_task(thread.run(slow))
    queued = asyncio.create_task(thread.run(lambda: done.append("queued")))
    await asyncio.get_running_loop().run_in_executor(None, started.wait)
    for _ in range(3):
        running.cancel()
        queued.cancel()
        await asyncio.sleep(0.01)
    assert queued.cancelled()
    assert not running.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert done == ["slow"]
    await thread.close()


def test_ucx_settings_keep_cma_out_and_bind_to_the_host() -> None:
    environment: dict[str, str] = {"UCX_KEEPALIVE_INTERVAL": "3s", "UCX_MM_ERROR_HANDLING": "n"}
    prepare_environment(environment, "127.0.0.1", "21000-21010")
    assert environment["UCX_TLS"] == "posix,sysv,tcp"
    assert environment["UCX_NET_DEVICES"] == "lo"
    assert environment["UCX_TCP_PORT_RANGE"] == "21000-21010"
    assert environment["UCX_KEEPALIVE_INTERVAL"] == "3s"
    assert environment["UCX_MM_ERROR_HANDLING"] == "y"
    for unsafe in ("all", "posix,cma,tcp", "^posix", "shm,tcp"):
        with pytest.raises(SettingsError, match="cma"):
            prepare_environment({"UCX_TLS": unsafe}, "127.0.0.1", None)
    with pytest.raises(SettingsError, match="interface"):
        interface_of("203.0.113.7")


def _belongings() -> tuple[int, list[str], list[str]]:
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith(("kv", "ucx"))]
    return len(os.listdir("/proc/self/fd")), threads, _shared_memory()


def _shared_memory() -> list[str]:
    """What outlives its processes, and what is mapped into this one. A System V segment that is marked for destruction goes
    with the last process that has it, so it is nothing left behind (and may be another mesh's on this machine)."""
    segments = Path("/proc/sysvipc/shm")
    rows = [line.split() for line in segments.read_text(encoding="ascii").splitlines()[1:]] if segments.exists() else []
    lasting = sorted(row[1] for row in rows if not int(row[2], 8) & _MARKED_FOR_DESTRUCTION)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    mapped = sorted(line.split()[5] for line in maps if "SYSV" in line or "ucx_shm" in line)
    return lasting + mapped + sorted(name for name in os.listdir("/dev/shm") if "ucx" in name)


def _protection_at(address: int) -> str:
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        bounds, protection = line.split()[:2]
        first, last = (int(bound, 16) for bound in bounds.split("-"))
        if first <= address < last:
            return protection
    raise AssertionError("the address is not mapped")
