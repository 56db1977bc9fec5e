"""The contract of the broker port: one body, run against the in-memory twin and against a real nats-server."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from common.ports.broker import Broker, Message
from common.values.errors import BrokerUnavailable, PayloadTooLarge
from tests.contract.broker_worlds import WAIT_S, BrokerWorld, Inbox, States, broker_world


@pytest_asyncio.fixture(params=["memory", pytest.param("nats", marks=pytest.mark.servers)])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[BrokerWorld]:
    async with broker_world(request.param) as running:
        yield running


def publish_until_refused(broker: Broker) -> int:
    """Messages of 100 bytes, without giving the loop a turn; how many were taken."""
    for accepted in range(10_000):
        try:
            broker.publish("x", bytes(100))
        except BrokerUnavailable:
            return accepted
    return 10_000


async def test_ten_thousand_messages_of_two_publishers_arrive_each_in_order(world: BrokerWorld) -> None:
    reader, writers = await world.connect(), [await world.connect(), await world.connect()]
    inbox = Inbox()
    await reader.subscribe("tokens.*", inbox)
    for number in range(5000):
        for index, writer in enumerate(writers):
            writer.publish(f"tokens.{index}", b"%d" % number)
    await inbox.wait_for(10_000)
    for index in range(2):
        assert [payload for subject, payload in inbox.received if subject == f"tokens.{index}"] == [b"%d" % n for n in range(5000)]


async def test_wildcards(world: BrokerWorld) -> None:
    broker = await world.connect()
    wanted = {
        "a.b": {"a.b"},
        "a.*": {"a.b", "a.c"},
        "*.b": {"a.b"},
        "a.>": {"a.b", "a.c", "a.b.c"},
        ">": {"a", "a.b", "a.c", "a.b.c", "ab.c.d"},
        "a.*.c": {"a.b.c"},
    }
    inboxes = {pattern: Inbox() for pattern in wanted}
    for pattern, inbox in inboxes.items():
        await broker.subscribe(pattern, inbox)
    for subject in ("a", "a.b", "a.c", "a.b.c", "ab.c.d"):
        broker.publish(subject, b"")
    for pattern, subjects in wanted.items():
        await inboxes[pattern].wait_for(len(subjects))
    assert await broker.ping(timeout_s=WAIT_S)
    assert {pattern: {s for s, _ in inbox.received if not s.startswith("_INBOX")} for pattern, inbox in inboxes.items()} == wanted


async def test_a_request_gets_its_answer(world: BrokerWorld) -> None:
    asker, answerer = await world.connect(), await world.connect()
    await answerer.subscribe("worker.1.inbox", Inbox(answer=b"accepted"))
    answers = await asyncio.gather(*(asker.request("worker.1.inbox", b"dispatch", timeout_s=WAIT_S) for _ in range(50)))
    assert answers == [b"accepted"] * 50


async def test_a_request_to_nobody_is_none_at_once(world: BrokerWorld) -> None:
    broker = await world.connect()
    async with asyncio.timeout(WAIT_S):
        assert await broker.request("worker.none.inbox", b"", timeout_s=10 * WAIT_S) is None


async def test_a_request_that_nobody_answers_ends_with_its_time_out(world: BrokerWorld) -> None:
    broker = await world.connect()
    inbox = Inbox()
    await broker.subscribe("silent", inbox)
    assert await broker.request("silent", b"hello", timeout_s=0.05) is None
    await inbox.wait_for(1)


async def test_a_request_never_overtakes_what_was_published_before(world: BrokerWorld) -> None:
    sender, receiver = await world.connect(), await world.connect()
    inbox = Inbox(answer=b"ok")
    await receiver.subscribe("inbox", inbox)
    for round_number in range(100):
        sender.publish("inbox", b"before %d" % round_number)
        assert await sender.request("inbox", b"request %d" % round_number, timeout_s=WAIT_S) == b"ok"
    expected = [text % number for number in range(100) for text in (b"before %d", b"request %d")]
    assert inbox.payloads == expected


async def test_an_answer_that_nobody_awaits_harms_nobody(world: BrokerWorld) -> None:
    broker = await world.connect()
    inbox = Inbox(answer=b"unasked")
    await broker.subscribe("inbox", inbox)
    broker.publish("inbox", b"1")
    broker.publish("inbox", b"2")
    await inbox.wait_for(2)
    assert await broker.ping(timeout_s=WAIT_S)


async def test_two_subscribers_each_get_every_message(world: BrokerWorld) -> None:
    first, second = await world.connect(), await world.connect()
    inboxes = [Inbox(), Inbox(), Inbox()]
    await first.subscribe("snapshot.*", inboxes[0])
    await first.subscribe("snapshot.*", inboxes[1])
    await second.subscribe("snapshot.1", inboxes[2])
    for number in range(100):
        first.publish("snapshot.1", b"%d" % number)
    for inbox in inboxes:
        await inbox.wait_for(100)
        assert inbox.payloads == [b"%d" % number for number in range(100)]


async def test_a_closed_subscription_gets_nothing_more(world: BrokerWorld) -> None:
    broker = await world.connect()
    closed, open_ = Inbox(), Inbox()
    subscription = await broker.subscribe("x", closed)
    await broker.subscribe("x", open_)
    broker.publish("x", b"1")
    await open_.wait_for(1)
    await closed.wait_for(1)
    await subscription.close()
    await subscription.close()
    broker.publish("x", b"2")
    await open_.wait_for(2)
    assert await broker.ping(timeout_s=WAIT_S)
    assert closed.payloads == [b"1"]


async def test_a_payload_at_the_limit_passes_and_one_past_it_is_refused(world: BrokerWorld) -> None:
    broker = await world.connect()
    inbox = Inbox()
    await broker.subscribe("large", inbox)
    at_the_limit = bytes(range(256)) * (broker.max_payload_bytes // 256)
    assert len(at_the_limit) == broker.max_payload_bytes == 1 << 20
    broker.publish("large", at_the_limit)
    with pytest.raises(PayloadTooLarge):
        broker.publish("large", at_the_limit + b"!")
    await inbox.wait_for(1)
    assert inbox.payloads == [at_the_limit]


async def test_a_handler_that_fails_stops_nothing(world: BrokerWorld) -> None:
    broker = await world.connect()
    inbox = Inbox()

    def fail_on_the_first(message: Message) -> None:
        inbox(message)
        if message.payload == b"0":
            raise ValueError("a bug of a handler")

    await broker.subscribe("x", fail_on_the_first)
    for number in range(3):
        broker.publish("x", b"%d" % number)
    await inbox.wait_for(3)


async def test_close_flushes_and_ends(world: BrokerWorld) -> None:
    reader, writer = await world.connect(), await world.connect()
    inbox = Inbox()
    await reader.subscribe("x", inbox)
    for number in range(2000):
        writer.publish("x", b"%d" % number)
    await writer.close()
    await writer.close()
    await inbox.wait_for(2000)
    assert not writer.connected
    with pytest.raises(BrokerUnavailable):
        writer.publish("x", b"late")
    assert not await writer.ping(timeout_s=1)


async def test_what_is_published_while_the_server_is_away_arrives_when_it_is_back(world: BrokerWorld) -> None:
    states, inbox = States(), Inbox()
    reader = await world.connect(on_state=states)
    await reader.subscribe("x", inbox)
    await world.stop()
    await states.wait_for(False)
    assert not reader.connected
    for number in range(100):
        reader.publish("x", b"%d" % number)
    await world.start()
    await states.wait_for(False, True)
    await inbox.wait_for(100)
    assert inbox.payloads == [b"%d" % number for number in range(100)]
    assert reader.connected


async def test_while_the_server_is_away_the_outbox_is_bounded_and_questions_fail(world: BrokerWorld) -> None:
    states, inbox = States(), Inbox()
    broker = await world.connect(on_state=states, max_outbox_bytes=10_000)
    await broker.subscribe("x", inbox)
    await world.stop()
    await states.wait_for(False)
    accepted = publish_until_refused(broker)
    assert 0 < accepted <= 100
    with pytest.raises(BrokerUnavailable):
        await broker.request("x", b"", timeout_s=WAIT_S)
    with pytest.raises(BrokerUnavailable):
        await broker.subscribe("y", inbox)
    assert not await broker.ping(timeout_s=WAIT_S)
    await world.start()
    await inbox.wait_for(accepted)
    assert await broker.request("nobody", b"", timeout_s=WAIT_S) is None
    assert len(inbox.received) == accepted


async def test_the_outbox_of_a_synchronous_burst_is_bounded(world: BrokerWorld) -> None:
    broker = await world.connect(max_outbox_bytes=10_000)
    assert 0 < publish_until_refused(broker) <= 100
    for _ in range(10):  # there is room again as soon as the loop runs
        await asyncio.sleep(0)
    assert await broker.ping(timeout_s=WAIT_S)


async def test_a_question_that_is_open_when_the_server_dies_fails(world: BrokerWorld) -> None:
    asker, silent = await world.connect(), await world.connect()
    inbox = Inbox()
    await silent.subscribe("x", inbox)
    question = asyncio.ensure_future(asker.request("x", b"", timeout_s=10 * WAIT_S))
    await inbox.wait_for(1)
    await world.stop()
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(BrokerUnavailable):
            await question


async def test_giving_up_at_any_moment_harms_nothing(world: BrokerWorld) -> None:
    """nats-py's own flush would leave its read loop dead here."""
    broker = await world.connect()
    inbox = Inbox(answer=b"yes")
    await broker.subscribe("x", inbox)
    for yields in range(12):
        tasks = [asyncio.ensure_future(work) for work in (broker.ping(timeout_s=WAIT_S), broker.request("x", b"", timeout_s=WAIT_S))]
        subscribing = asyncio.ensure_future(broker.subscribe("x", lambda message: None))
        for _ in range(yields):
            await asyncio.sleep(0)
        for task in (*tasks, subscribing):
            task.cancel()
        await asyncio.gather(*tasks, subscribing, return_exceptions=True)
    assert await broker.request("x", b"", timeout_s=WAIT_S) == b"yes"
    assert await broker.ping(timeout_s=WAIT_S)
