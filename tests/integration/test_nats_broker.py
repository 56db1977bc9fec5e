"""What only a real nats-server shows: its addresses and credentials, TLS, freezing, and connections that it ends itself."""

import asyncio
import logging
import os
from pathlib import Path

import nkeys
import pytest
import uvloop

from common.adapters.nats_broker import NatsBroker
from common.adapters.redis_store import RedisStore
from common.values.errors import BrokerUnavailable, SettingsError
from common.values.server_access import ANONYMOUS, NatsIdentity, TlsFiles
from tests.certificates import make_authority
from tests.contract.broker_worlds import WAIT_S, Inbox, States
from tests.nats_accounts import make_operated
from tests.servers import RunningServer, free_port, running_nats

pytestmark = pytest.mark.servers


async def test_an_unreachable_server_is_named_without_its_password() -> None:
    port = free_port()
    with pytest.raises(BrokerUnavailable) as caught:
        await NatsBroker.connect([f"nats://ada:s3cret@127.0.0.1:{port}"], name="test", connect_timeout_s=0.5)
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert "nats-server" in str(caught.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1", "nats://", "nats://127.0.0.1:port", "tls://[::1"])
async def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(SettingsError):
        await NatsBroker.connect([url], name="test")


async def test_of_several_servers_the_living_one_is_used(nats_server: RunningServer) -> None:
    broker = await NatsBroker.connect([f"127.0.0.1:{free_port()}", nats_server.url], name="test")
    assert await broker.ping(timeout_s=WAIT_S)
    await broker.close()


async def test_user_and_password_are_taken_decoded_and_a_wrong_one_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with running_nats("--user", "ada", "--pass", "p@ss/w:rd") as server:
        where = server.url.removeprefix("nats://")
        broker = await NatsBroker.connect([f"nats://ada:p%40ss%2Fw%3Ard@{where}"], name="test")
        assert await broker.ping(timeout_s=WAIT_S)
        await broker.close()
        with pytest.raises(BrokerUnavailable, match=r"(?i)(authorization|reset).*credentials"):
            await NatsBroker.connect([f"nats://ada:wrong@{where}"], name="test", connect_timeout_s=0.5)
    assert "p@ss" not in caplog.text
    assert "p%40ss" not in caplog.text


async def test_a_token_is_taken() -> None:
    async with running_nats("--auth", "t0ken") as server:
        broker = await NatsBroker.connect([server.url.replace("//", "//t0ken@")], name="test")
        assert await broker.ping(timeout_s=WAIT_S)
        await broker.close()


async def test_tls_works_and_a_tls_url_never_falls_back_to_plain_text(tmp_path: Path, nats_server: RunningServer) -> None:
    authority = await make_authority(tmp_path)
    tls = TlsFiles(ca=authority.ca)
    async with running_nats("--tls", "--tlscert", authority.certificate, "--tlskey", authority.key) as server:
        url = server.url.replace("nats:", "tls:")
        broker = await NatsBroker.connect([url], name="test", tls=tls)
        assert await broker.ping(timeout_s=WAIT_S)
        await server.kill()
        await server.start()
        async with asyncio.timeout(WAIT_S):
            while not await broker.ping(timeout_s=1.0):
                await asyncio.sleep(0.1)
        await broker.close()
        with pytest.raises(BrokerUnavailable, match=r"(?i)certificate"):
            await NatsBroker.connect([url], name="test", connect_timeout_s=1)
        with pytest.raises(BrokerUnavailable, match=r"(?i)certificate|hostname"):
            await NatsBroker.connect([url.replace("127.0.0.1", "localhost")], name="test", tls=tls, connect_timeout_s=1)
    with pytest.raises(BrokerUnavailable, match="secure connection not available"):
        await NatsBroker.connect([nats_server.url.replace("nats://", "tls://ada:pw@")], name="test", tls=tls, connect_timeout_s=0.5)


async def test_a_server_that_asks_for_our_certificate_gets_it(tmp_path: Path) -> None:
    authority = await make_authority(tmp_path)
    options = ("--tlsverify", "--tlscacert", authority.ca, "--tlscert", authority.certificate, "--tlskey", authority.key)
    async with running_nats(*options) as server:
        url = server.url.replace("nats:", "tls:")
        ours = TlsFiles(ca=authority.ca, certificate=authority.certificate, key=authority.key)
        broker = await NatsBroker.connect([url], name="test", tls=ours)
        assert await broker.ping(timeout_s=WAIT_S)
        await broker.close()
        with pytest.raises(BrokerUnavailable):
            await NatsBroker.connect([url], name="test", tls=TlsFiles(ca=authority.ca), connect_timeout_s=1)


@pytest.mark.parametrize(
    ("tls", "names"),
    [
        (TlsFiles(ca="/nowhere/ca.pem"), "tls_ca_file /nowhere/ca.pem"),
        (TlsFiles(ca=__file__), "tls_ca_file"),
        (TlsFiles(certificate="/nowhere/own.pem"), "tls_cert_file /nowhere/own.pem"),
        (TlsFiles(key="/nowhere/key.pem"), "tls_key_file"),
    ],
)
async def test_a_tls_file_that_cannot_be_used_is_named(tls: TlsFiles, names: str) -> None:
    with pytest.raises(SettingsError, match=names):
        await NatsBroker.connect(["nats://127.0.0.1:1"], name="test", tls=tls)
    with pytest.raises(SettingsError, match=names):
        await RedisStore.connect(["redis://127.0.0.1:1"], tls=tls)


async def test_an_identity_file_that_cannot_be_used_is_named_without_its_content(tmp_path: Path) -> None:
    odd = tmp_path / "odd.creds"
    odd.write_text("s3cret")
    for identity in (
        NatsIdentity(creds_file="/nowhere/a.creds"),
        NatsIdentity(creds_file=str(odd)),
        NatsIdentity(nkey_file=str(odd)),
        NatsIdentity(creds_file=str(odd), nkey_file=str(odd)),
    ):
        with pytest.raises(SettingsError, match=r"nats_\w+_file") as caught:
            await NatsBroker.connect(["nats://127.0.0.1:1"], name="test", identity=identity)
        assert "s3cret" not in str(caught.value)


async def test_an_nkey_is_taken(tmp_path: Path) -> None:
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    file = tmp_path / "user.nk"
    file.write_bytes(seed)
    public = nkeys.from_seed(bytearray(seed)).public_key.decode()
    configuration = tmp_path / "nats.conf"
    configuration.write_text(f"authorization {{ users: [ {{ nkey: {public} }} ] }}\n")
    async with running_nats("--config", str(configuration)) as server:
        broker = await NatsBroker.connect([server.url], name="test", identity=NatsIdentity(nkey_file=str(file)))
        assert await broker.ping(timeout_s=WAIT_S)
        await broker.close()
        with pytest.raises(BrokerUnavailable):
            await NatsBroker.connect([server.url], name="test", connect_timeout_s=0.5)


async def test_a_creds_file_is_taken_by_a_server_in_operator_mode_and_one_of_another_account_is_not(tmp_path: Path) -> None:
    operated = make_operated(tmp_path)
    async with running_nats("--config", operated.configuration) as server:
        inbox = Inbox()
        broker = await NatsBroker.connect([server.url], name="test", identity=NatsIdentity(creds_file=operated.creds))
        await broker.subscribe("x", inbox)
        broker.publish("x", b"hello")
        await inbox.wait_for(1)
        await server.kill()
        await server.start()
        async with asyncio.timeout(WAIT_S):
            while not await broker.ping(timeout_s=1.0):
                await asyncio.sleep(0.1)
        await broker.close()
        for identity in (NatsIdentity(creds_file=operated.stranger), ANONYMOUS):
            with pytest.raises(BrokerUnavailable, match=r"(?i)authorization"):
                await NatsBroker.connect([server.url], name="test", identity=identity, connect_timeout_s=0.5)


async def test_a_ping_given_up_on_a_frozen_server_does_not_harm_the_connection(nats_server: RunningServer) -> None:
    states, inbox = States(), Inbox()
    broker = await NatsBroker.connect([nats_server.url], name="test", on_state=states)
    await broker.subscribe("x", inbox)
    nats_server.freeze()
    assert not await broker.ping(timeout_s=0.05)
    assert await broker.request("x", b"given up", timeout_s=0.05) is None
    nats_server.thaw()
    assert await broker.ping(timeout_s=WAIT_S)
    broker.publish("x", b"1")
    await inbox.wait_for(2)
    assert states.seen == []
    await broker.close()


async def test_a_connection_that_the_server_ends_for_good_is_made_anew(tmp_path: Path) -> None:
    """nats-py closes itself on such an error and never comes back: here one subscription more than the account may have."""
    configuration = tmp_path / "nats.conf"
    configuration.write_text("max_subscriptions: 2\n")
    async with running_nats("--config", str(configuration)) as server:
        states, inbox = States(), Inbox()
        broker = await NatsBroker.connect([server.url], name="test", on_state=states)
        await broker.subscribe("x", inbox)
        with pytest.raises(BrokerUnavailable, match="maximum subscriptions exceeded"):
            await broker.subscribe("one.too.many", inbox)
        await states.wait_for(False, True)
        broker.publish("x", b"still here")
        await inbox.wait_for(1)
        assert broker.counts()["connections"] == 2
        await broker.close()


async def test_a_subscription_that_is_not_permitted_is_refused(tmp_path: Path) -> None:
    configuration = tmp_path / "nats.conf"
    configuration.write_text(
        'authorization { users = [{user: ada, password: pw, permissions: {subscribe: ["_INBOX.>", "mine.>"]}}] }\n'
    )
    async with running_nats("--config", str(configuration)) as server:
        broker = await NatsBroker.connect([server.url.replace("//", "//ada:pw@")], name="test")
        inbox = Inbox()
        with pytest.raises(BrokerUnavailable, match=r"(?i)permissions violation"):
            await broker.subscribe("others.x", inbox)
        await broker.subscribe("mine.x", inbox)
        broker.publish("mine.x", b"1")
        await inbox.wait_for(1)
        await broker.close()


async def test_close_ends_although_the_server_is_gone_or_frozen() -> None:
    async with running_nats() as server:
        states = States()
        gone = await NatsBroker.connect([server.url], name="test", on_state=states)
        await gone.subscribe("x", Inbox())
        await server.kill()
        await states.wait_for(False)
        gone.publish("x", b"never sent")
        await gone.close()
        assert gone.counts()["dropped"] == 1
        await server.start()
        frozen = await NatsBroker.connect([server.url], name="test")
        await frozen.subscribe("x", Inbox())
        server.freeze()
        for _ in range(200):
            frozen.publish("x", bytes(50_000))
        async with asyncio.timeout(WAIT_S):
            await frozen.close()


async def test_losing_the_server_logs_little(nats_server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    states = States()
    broker = await NatsBroker.connect([nats_server.url], name="test", on_state=states)
    await nats_server.kill()
    await states.wait_for(False)
    await asyncio.sleep(1.5)
    await nats_server.start()
    await states.wait_for(False, True)
    events = [record.getMessage() for record in caplog.records if record.name.startswith("common.")]
    assert events.count("broker_lost") == 1
    assert events.count("broker_connected") == 2
    assert len(events) < 10
    await broker.close()


def test_on_the_loop_of_the_services() -> None:
    """The services run on uvloop, whose transports fail in other ways than asyncio's."""

    async def lose_and_find_the_server() -> list[bytes]:
        states, inbox = States(), Inbox(answer=b"yes")
        async with running_nats() as server:
            broker = await NatsBroker.connect([server.url], name="test", on_state=states)
            await broker.subscribe("x", inbox)
            for _ in range(100):
                broker.publish("x", bytes(100_000))
            await server.kill()
            await states.wait_for(False)
            broker.publish("x", b"while away")
            await server.start()
            await states.wait_for(False, True)
            assert await broker.request("x", b"asked", timeout_s=WAIT_S) == b"yes"
            await broker.close()
        return inbox.payloads[-2:]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(lose_and_find_the_server()) == [b"while away", b"asked"]
