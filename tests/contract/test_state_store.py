"""The contract of the state store port: one body, run against the in-memory twin and against a real valkey-server."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from common.ports.state_store import StateStore
from common.values.errors import InvariantBroken, StoreUnavailable
from tests.contract.store_worlds import StoreWorld, store_world

LONG_S = 600.0


@pytest_asyncio.fixture(params=["memory", pytest.param("valkey", marks=pytest.mark.servers)])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[StoreWorld]:
    async with store_world(request.param) as running:
        yield running


async def test_a_record_is_read_as_it_was_written_whatever_its_bytes(world: StoreWorld) -> None:
    fields = {"state": b"running", "every byte": bytes(range(256)), "empty": b"", "ü": b"\xff\x00\r\n", "large": bytes(1 << 20)}
    await world.first.put("request:ü 1", fields, ttl_s=LONG_S)
    assert await world.second.read("request:ü 1") == fields
    assert await world.second.read("request:2") is None


async def test_put_leaves_other_fields(world: StoreWorld) -> None:
    await world.first.put("k", {"a": b"1", "b": b"1"}, ttl_s=LONG_S)
    await world.second.put("k", {"b": b"2", "c": b"2"}, ttl_s=LONG_S)
    assert await world.first.read("k") == {"a": b"1", "b": b"2", "c": b"2"}


async def test_create_makes_a_record_once(world: StoreWorld) -> None:
    assert await world.first.create("k", {"a": b"1"}, ttl_s=LONG_S)
    assert not await world.second.create("k", {"a": b"2", "b": b"2"}, ttl_s=LONG_S)
    assert await world.first.read("k") == {"a": b"1"}
    await world.first.delete("k")
    await world.first.delete("k")
    assert await world.first.read("k") is None
    assert await world.second.create("k", {"a": b"3"}, ttl_s=LONG_S)


async def test_a_record_without_fields_is_a_bug(world: StoreWorld) -> None:
    with pytest.raises(InvariantBroken):
        await world.first.create("k", {}, ttl_s=LONG_S)
    with pytest.raises(InvariantBroken):
        await world.first.put("k", {}, ttl_s=LONG_S)


async def test_of_many_concurrent_creates_exactly_one_wins(world: StoreWorld) -> None:
    for round_number in range(5):
        key = f"k{round_number}"
        stores = [world.first, world.second] * 30
        wins = await asyncio.gather(*(store.create(key, {"owner": b"%d" % n}, ttl_s=LONG_S) for n, store in enumerate(stores)))
        assert sum(wins) == 1
        assert await world.first.read(key) == {"owner": b"%d" % wins.index(True)}


async def test_update_if_compares_every_field(world: StoreWorld) -> None:
    await world.first.put("k", {"attempt": b"1", "owner": b"g1"}, ttl_s=LONG_S)
    update = world.second.update_if
    assert not await update("k", expected={"attempt": b"1", "owner": b"g2"}, changes={"attempt": b"9"}, ttl_s=LONG_S)
    assert not await update("k", expected={"absent": b""}, changes={"attempt": b"9"}, ttl_s=LONG_S)
    assert not await update("missing", expected={"attempt": b"1"}, changes={"attempt": b"9"}, ttl_s=LONG_S)
    assert not await update("missing", expected={}, changes={"attempt": b"9"}, ttl_s=LONG_S)
    assert await world.first.read("missing") is None
    assert await update("k", expected={"attempt": b"1", "owner": b"g1"}, changes={"attempt": b"2", "new": b"x"}, ttl_s=LONG_S)
    assert await world.first.read("k") == {"attempt": b"2", "owner": b"g1", "new": b"x"}
    assert await update("k", expected={}, changes={"attempt": b"3"}, ttl_s=LONG_S)
    assert await update("k", expected={"attempt": b"3"}, changes={}, ttl_s=LONG_S)


async def test_of_many_concurrent_compare_and_sets_exactly_one_wins_each_round(world: StoreWorld) -> None:
    await world.first.put("k", {"attempt": b"0"}, ttl_s=LONG_S)
    stores = [world.first, world.second] * 25
    for attempt in range(5):
        wins = await asyncio.gather(
            *(
                store.update_if(
                    "k",
                    expected={"attempt": b"%d" % attempt},
                    changes={"attempt": b"%d" % (attempt + 1), "by": b"%d" % n},
                    ttl_s=LONG_S,
                )
                for n, store in enumerate(stores)
            )
        )
        assert sum(wins) == 1
        assert await world.first.read("k") == {"attempt": b"%d" % (attempt + 1), "by": b"%d" % wins.index(True)}


async def test_a_counter_under_compare_and_set_loses_no_step(world: StoreWorld) -> None:
    """Writers of another field disturb the watch, but must never make a compare-and-set fail."""
    await world.first.put("k", {"count": b"0"}, ttl_s=LONG_S)

    async def count_up() -> None:
        for _ in range(10):
            while True:
                record = await world.first.read("k")
                assert record is not None
                count = record["count"]
                if await world.first.update_if(
                    "k", expected={"count": count}, changes={"count": b"%d" % (int(count) + 1)}, ttl_s=LONG_S
                ):
                    break

    async def disturb() -> None:
        for number in range(30):
            await world.second.put("k", {"other": b"%d" % number}, ttl_s=LONG_S)

    await asyncio.gather(*(count_up() for _ in range(4)), disturb())
    assert await world.first.read("k") == {"count": b"40", "other": b"29"}


async def test_every_way_of_writing_gives_a_time_to_live(world: StoreWorld) -> None:
    store = world.first
    await store.put("put", {"a": b"1"}, ttl_s=0.3)
    assert await store.create("create", {"a": b"1"}, ttl_s=0.3)
    for key in ("update", "refresh", "kept by put", "kept by update", "kept by refresh"):
        await store.put(key, {"a": b"1"}, ttl_s=LONG_S if key in ("update", "refresh") else 0.3)
    assert await store.update_if("update", expected={"a": b"1"}, changes={"a": b"2"}, ttl_s=0.3)
    assert await store.refresh("refresh", ttl_s=0.3)
    await store.put("kept by put", {"b": b"1"}, ttl_s=LONG_S)
    assert await store.update_if("kept by update", expected={"a": b"1"}, changes={}, ttl_s=LONG_S)
    assert await store.refresh("kept by refresh", ttl_s=LONG_S)
    await world.let_pass(0.6)
    assert set(await store.keys("")) == {"kept by put", "kept by update", "kept by refresh"}
    assert await store.read("put") is None
    assert not await store.refresh("create", ttl_s=LONG_S)
    assert not await store.update_if("update", expected={"a": b"2"}, changes={"a": b"3"}, ttl_s=LONG_S)
    assert await store.create("refresh", {"a": b"new"}, ttl_s=LONG_S)


async def test_keys_finds_each_of_thousands_once_and_takes_the_prefix_literally(world: StoreWorld) -> None:
    wanted = [f"segue:[m*]:request:{number}" for number in range(3000)]
    others = [f"segue:m:request:{number}" for number in range(2000)]
    await asyncio.gather(*(world.first.put(key, {"a": b"1"}, ttl_s=LONG_S) for key in wanted + others))
    found = await world.second.keys("segue:[m*]:")
    assert sorted(found) == sorted(wanted)
    assert await world.second.keys("segue:m?") == []


async def test_a_dead_server_is_an_error_and_one_that_is_back_works(world: StoreWorld) -> None:
    await world.first.put("k", {"a": b"1"}, ttl_s=LONG_S)
    assert await world.first.ping(timeout_s=5)
    await world.stop()
    store = world.first
    async with asyncio.timeout(10):  # the stores' own time-out is longer: death is noticed, not waited for
        for call in (
            store.read("k"),
            store.put("k", {"a": b"1"}, ttl_s=1),
            store.create("k", {"a": b"1"}, ttl_s=1),
            store.update_if("k", expected={"a": b"1"}, changes={"a": b"2"}, ttl_s=1),
            store.refresh("k", ttl_s=1),
            store.delete("k"),
            store.keys(""),
        ):
            with pytest.raises(StoreUnavailable):
                await call
        assert not await store.ping(timeout_s=5)
    await world.start()
    await store.put("k", {"a": b"2"}, ttl_s=LONG_S)
    assert await world.second.read("k") == {"a": b"2"}
    assert await store.ping(timeout_s=5)


async def test_giving_up_at_any_moment_mixes_no_answers(world: StoreWorld) -> None:
    for name in ("a", "b"):
        await world.first.put(name, {"is": name.encode()}, ttl_s=LONG_S)
    for yields in range(25):
        tasks = [
            asyncio.ensure_future(world.first.read("a")),
            asyncio.ensure_future(world.first.update_if("a", expected={"is": b"a"}, changes={"n": b"1"}, ttl_s=LONG_S)),
            asyncio.ensure_future(world.first.keys("a")),
        ]
        for _ in range(yields):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        records = await asyncio.gather(*(world.first.read("b") for _ in range(20)))
        assert records == [{"is": b"b"}] * 20


async def test_entries_are_appended_in_order_to_several_lists_at_once(world: StoreWorld) -> None:
    assert await world.first.append({"a": [b"1", b"2"], "b": [b"x"]}, ttl_s=LONG_S) == {"a": 2, "b": 1}
    assert await world.second.append({"c": [b""], "a": [bytes(range(256))]}, ttl_s=LONG_S) == {"c": 1, "a": 3}
    assert await world.second.append({}, ttl_s=LONG_S) == {}
    with pytest.raises(InvariantBroken):
        await world.first.append({"b": [b"y"], "none": []}, ttl_s=LONG_S)
    assert await world.second.read_list("a") == [b"1", b"2", bytes(range(256))]
    assert (await world.first.read_list("b"), await world.first.read_list("c")) == ([b"x"], [b""])
    assert await world.first.read_list("none") == []


async def test_concurrent_appends_lose_nothing_and_keep_each_writers_order(world: StoreWorld) -> None:
    async def write(store: StateStore, writer: bytes) -> None:
        for number in range(20):
            await store.append({"log": [b"%s %d" % (writer, 2 * number), b"%s %d" % (writer, 2 * number + 1)]}, ttl_s=LONG_S)

    await asyncio.gather(write(world.first, b"p"), write(world.second, b"q"))
    entries = await world.first.read_list("log")
    for writer in (b"p", b"q"):
        assert [e for e in entries if e.startswith(writer)] == [b"%s %d" % (writer, n) for n in range(40)]
    assert len(entries) == 80


async def test_an_append_renews_the_lists_time_to_live(world: StoreWorld) -> None:
    await world.first.append({"log": [b"1"]}, ttl_s=1.0)
    await world.let_pass(0.5)
    await world.first.append({"log": [b"2"]}, ttl_s=1.0)
    await world.let_pass(0.7)
    assert await world.second.read_list("log") == [b"1", b"2"]
    await world.let_pass(0.5)
    assert await world.second.read_list("log") == []
    assert "log" not in await world.second.keys("l")
