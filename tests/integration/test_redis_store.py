"""What only a real server shows: each way of not serving has its own clear message, which never tells what was stored."""

import asyncio

import pytest
import uvloop

from common.adapters.redis_store import RedisStore
from common.values.errors import SettingsError, StoreUnavailable
from tests.servers import RunningServer, free_port, running_valkey

pytestmark = pytest.mark.servers
SECRET = b"Dear diary"


async def test_an_unreachable_server_is_named_without_its_password() -> None:
    port = free_port()
    with pytest.raises(StoreUnavailable) as caught:
        await RedisStore.connect([f"redis://:s3cret@127.0.0.1:{port}/0"], timeout_s=1)
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert "valkey-server" in str(caught.value)


async def test_what_is_no_url_is_refused() -> None:
    for url in ("http://127.0.0.1", "redis://127.0.0.1:port"):
        with pytest.raises(SettingsError):
            await RedisStore.connect([url])


async def test_a_missing_and_a_wrong_password_are_told_and_the_right_one_works_percent_encoded() -> None:
    async with running_valkey("--requirepass", "p@ss/w:rd") as server:
        for url in (server.url, server.url.replace("//", "//:wrong@"), server.url.replace("//", "//ada:wrong@")):
            with pytest.raises(StoreUnavailable, match="password"):
                await RedisStore.connect([url])
        store = await RedisStore.connect([server.url.replace("//", "//:p%40ss%2Fw%3Ard@")])
        await store.put("k", {"a": b"1"}, ttl_s=60)
        await store.close()


async def test_a_full_server_is_told_without_what_was_to_be_stored() -> None:
    async with running_valkey("--maxmemory", "3mb", "--maxmemory-policy", "noeviction") as server:
        store = await RedisStore.connect([server.url])
        reasons = []
        for number in range(200):
            try:
                write = store.create if number % 2 else store.put
                await write(f"k{number}", {"body": SECRET + bytes(50_000)}, ttl_s=60)
            except StoreUnavailable as error:
                reasons.append(f"{error} {error.__cause__} {error.__context__}")
        assert len(reasons) > 50
        assert all("full" in reason and SECRET.decode() not in reason for reason in reasons)
        await store.delete("k0")
        assert await store.read("k1") is not None
        await store.close()


async def test_a_key_of_another_kind_is_told_by_its_code_alone(valkey_server: RunningServer) -> None:
    from redis.asyncio import Redis

    other = Redis.from_url(valkey_server.url)
    await other.set("k", SECRET)
    await other.aclose()
    store = await RedisStore.connect([valkey_server.url])
    for call in (
        store.read("k"),
        store.put("k", {"body": SECRET}, ttl_s=1),
        store.update_if("k", expected={"a": SECRET}, changes={}, ttl_s=1),
    ):
        with pytest.raises(StoreUnavailable, match="WRONGTYPE") as caught:
            await call
        assert SECRET.decode() not in f"{caught.value} {caught.value.__context__}"
    await store.close()


async def test_a_frozen_server_is_an_error_in_time_and_answers_are_not_mixed_after_it_thaws(valkey_server: RunningServer) -> None:
    store = await RedisStore.connect([valkey_server.url], timeout_s=0.4)
    for name in ("a", "b"):
        await store.put(name, {"is": name.encode()}, ttl_s=60)
    valkey_server.freeze()
    calls = [store.read("a"), store.update_if("a", expected={"is": b"a"}, changes={"x": b"1"}, ttl_s=60), store.keys("a")] * 4
    async with asyncio.timeout(10):
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(outcome, StoreUnavailable) and "no answer within 0.4 s" in str(outcome) for outcome in outcomes)
        assert not await store.ping(timeout_s=0.1)
    valkey_server.thaw()
    records = await asyncio.gather(*(store.read("b") for _ in range(40)))
    assert records == [{"is": b"b"}] * 40
    await store.close()


async def test_of_several_servers_the_primary_is_used() -> None:
    async with running_valkey() as primary, running_valkey("--replicaof", "127.0.0.1", str(primary.port)) as replica:
        dead = f"redis://127.0.0.1:{free_port()}"
        store = await RedisStore.connect([dead, replica.url, primary.url])
        await store.put("k", {"a": b"1"}, ttl_s=60)
        await store.close()
        only_replica = await RedisStore.connect([replica.url])
        with pytest.raises(StoreUnavailable, match="replica"):
            await only_replica.put("k", {"a": b"1"}, ttl_s=60)
        await only_replica.close()


async def test_more_operations_than_connections_wait_their_turn(valkey_server: RunningServer) -> None:
    store = await RedisStore.connect([valkey_server.url], timeout_s=20)
    made = await asyncio.gather(*(store.create(f"k{n}", {"n": b"%d" % n}, ttl_s=60) for n in range(500)))
    assert all(made)
    assert store.counts()["errors"] == 0
    await store.close()


def test_on_the_loop_of_the_services() -> None:
    """The services run on uvloop, whose transports fail in other ways than asyncio's."""

    async def lose_and_find_the_server() -> None:
        async with running_valkey() as server:
            store = await RedisStore.connect([server.url])
            await asyncio.gather(*(store.put(f"k{n}", {"a": bytes(100_000)}, ttl_s=60) for n in range(50)))
            under_way = [asyncio.ensure_future(store.create(f"n{n}", {"a": bytes(100_000)}, ttl_s=60)) for n in range(50)]
            await asyncio.sleep(0)
            await server.kill()
            outcomes = await asyncio.gather(*under_way, return_exceptions=True)
            assert all(outcome is True or isinstance(outcome, StoreUnavailable) for outcome in outcomes)
            with pytest.raises(StoreUnavailable):
                await store.read("k0")
            await server.start()
            outcomes = await asyncio.gather(*(store.create(f"k{n}", {"a": b"1"}, ttl_s=60) for n in range(50)))
            assert all(outcomes)
            await store.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(lose_and_find_the_server())
