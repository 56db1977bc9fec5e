"""How a store is reached: TLS, users, replicas, sentinels. The packaged Valkey speaks no TLS, so a TLS end stands before it."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from common.adapters.redis_store import RedisStore
from common.values.errors import SettingsError, StoreUnavailable
from common.values.server_access import TlsFiles
from tests.certificates import Authority, make_authority
from tests.servers import RunningServer, free_port, running_sentinel, running_valkey

pytestmark = pytest.mark.servers
WAIT_S = 20.0


@asynccontextmanager
async def tls_end(server: RunningServer, authority: Authority, *, asks_for_certificate: bool = False) -> AsyncIterator[int]:
    """Takes TLS on a port of its own and passes the bytes on to the server."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority.ca)
    context.load_cert_chain(authority.certificate, authority.key)
    context.verify_mode = ssl.CERT_REQUIRED if asks_for_certificate else ssl.CERT_NONE

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with listening:
        yield listening.sockets[0].getsockname()[1]


async def works(store: RedisStore) -> bool:
    await store.put("key", {"field": b"value"}, ttl_s=60)
    return await store.read("key") == {"field": b"value"}


async def test_tls_with_the_name_and_the_certificate_checked(tmp_path: Path, valkey_server: RunningServer) -> None:
    authority = await make_authority(tmp_path)
    async with tls_end(valkey_server, authority) as port:
        store = await RedisStore.connect([f"rediss://127.0.0.1:{port}"], tls=TlsFiles(ca=authority.ca))
        assert await works(store)
        await store.close()
        with pytest.raises(StoreUnavailable, match=r"(?i)certificate"):
            await RedisStore.connect([f"rediss://127.0.0.1:{port}"])
        with pytest.raises(StoreUnavailable, match=r"(?i)certificate|hostname|mismatch"):
            await RedisStore.connect([f"rediss://localhost:{port}"], tls=TlsFiles(ca=authority.ca))


async def test_our_certificate_is_shown_where_it_is_asked_for(tmp_path: Path, valkey_server: RunningServer) -> None:
    authority = await make_authority(tmp_path)
    async with tls_end(valkey_server, authority, asks_for_certificate=True) as port:
        ours = TlsFiles(ca=authority.ca, certificate=authority.certificate, key=authority.key)
        store = await RedisStore.connect([f"rediss://127.0.0.1:{port}"], tls=ours)
        assert await works(store)
        await store.close()
        with pytest.raises(StoreUnavailable):
            await RedisStore.connect([f"rediss://127.0.0.1:{port}"], tls=TlsFiles(ca=authority.ca))


async def test_a_user_and_a_percent_encoded_password() -> None:
    async with running_valkey(*["--user", "ada", "on", ">p@ss/w:rd", "~*", "&*", "+@all", "--user", "default", "off"]) as server:
        where = server.url.removeprefix("redis://")
        store = await RedisStore.connect([f"redis://ada:p%40ss%2Fw%3Ard@{where}/2"])
        assert await works(store)
        await store.close()
        with pytest.raises(StoreUnavailable, match="password") as caught:
            await RedisStore.connect([f"redis://ada:p%40ss@{where}"])
        assert "p%40ss" not in str(caught.value)


async def test_a_replica_that_becomes_primary_is_found(valkey_server: RunningServer) -> None:
    async with running_valkey("--replicaof", f"127.0.0.1 {valkey_server.port}") as replica:
        store = await RedisStore.connect([replica.url, valkey_server.url])
        assert await works(store)
        await valkey_server.kill()
        async with Redis.from_url(replica.url) as direct:
            await direct.execute_command("REPLICAOF", "NO", "ONE")
        await until_it_works(store)
        await store.close()


async def test_sentinels_tell_who_is_primary_now(valkey_server: RunningServer) -> None:
    async with (
        running_valkey("--replicaof", f"127.0.0.1 {valkey_server.port}") as replica,
        running_sentinel("lead", valkey_server.port) as sentinel,
    ):
        urls = [f"sentinel://127.0.0.1:{free_port()}/lead", f"sentinel://127.0.0.1:{sentinel.port}/lead"]
        store = await RedisStore.connect(urls)
        assert await works(store)
        async with Redis.from_url(f"redis://127.0.0.1:{sentinel.port}") as asked:
            await asked.execute_command("SENTINEL", "DEBUG", "info-period", "100")
            await fail_over(asked)
            async with asyncio.timeout(WAIT_S):
                while int((await asked.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "lead"))[1]) != replica.port:
                    await asyncio.sleep(0.1)
        async with Redis.from_url(replica.url) as direct, asyncio.timeout(WAIT_S):
            while await direct.hget("key", "field") != b"value":  # until the old primary knows that it is none any more
                await until_it_works(store)
        await store.close()
        with pytest.raises(StoreUnavailable, match="primary of that name"):
            await RedisStore.connect([f"sentinel://127.0.0.1:{sentinel.port}/other"])


@pytest.mark.parametrize(
    "urls",
    [
        ["sentinel://127.0.0.1:1"],
        ["sentinel://127.0.0.1:1/a", "sentinel://127.0.0.1:2/b"],
        ["sentinel://127.0.0.1:1/a", "redis://127.0.0.1:2"],
        ["sentinel://127.0.0.1:1/a?database=x"],
        ["http://127.0.0.1"],
    ],
)
async def test_what_makes_no_sense_is_refused(urls: list[str]) -> None:
    with pytest.raises(SettingsError):
        await RedisStore.connect(urls)


async def fail_over(sentinel: Redis) -> None:
    """The sentinel says no until it has seen a replica that is up to date."""
    async with asyncio.timeout(WAIT_S):
        while True:
            with contextlib.suppress(ResponseError):
                await sentinel.execute_command("SENTINEL", "FAILOVER", "lead")
                return
            await asyncio.sleep(0.1)


async def until_it_works(store: RedisStore) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            with contextlib.suppress(StoreUnavailable):
                assert await works(store)
                return
            await asyncio.sleep(0.1)
