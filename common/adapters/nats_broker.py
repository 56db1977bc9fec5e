"""The broker port on NATS (core publish and request/reply; no JetStream).

`publish` is synchronous: messages queue in one bounded outbox, and one writer hands them to nats-py in order. Requests
and answers go the same way, so nothing overtakes. While the connection is down they wait in the outbox.

nats-py's `flush` and `rtt` kill its read loop when they are given up before the PONG comes. Round trips are therefore
questions to our own inbox, which the server answers by delivering them.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nats import errors
from nats.nuid import NUID

from common.adapters.nats_connection import CLOSE_TIMEOUT_S, NatsConnection, NatsSubscription
from common.adapters.outbox import Outbox, Outgoing
from common.adapters.reply_waiters import ReplyWaiters, await_reply
from common.ports.broker import Message
from common.values.errors import BrokerUnavailable, PayloadTooLarge
from common.values.server_access import ANONYMOUS, SYSTEM_TLS, NatsIdentity, TlsFiles

NO_RESPONDERS_STATUS = "503"
CONFIRM_TIMEOUT_S = 5.0
"""How long `subscribe` waits for the server to confirm."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _NatsMessage:
    broker: "NatsBroker"
    subject: str
    payload: bytes
    reply: str

    def respond(self, payload: bytes) -> None:
        self.broker.respond(self.reply, payload)


class NatsBroker:
    """One connection to NATS. Make it with `connect`; end it with `close`."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        name: str,
        on_state: Callable[[bool], None] | None,
        tls: TlsFiles,
        identity: NatsIdentity,
        max_outbox_bytes: int,
    ) -> None:
        self._counts: Counter[str] = Counter(published=0, delivered=0, dropped=0, errors=0, connections=0, handler_errors=0)
        self._connection = NatsConnection(urls, name=name, tls=tls, identity=identity, on_state=self._take_state, counts=self._counts)
        self._name = name
        self._on_state = on_state
        self._outbox = Outbox(max_outbox_bytes)
        self._waiters = ReplyWaiters(f"_INBOX.{NUID().next().decode()}")
        self._connection.add(self._waiters.subject, self._take_reply)
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def connect(
        cls,
        urls: Sequence[str],
        *,
        name: str,
        connect_timeout_s: float = 5.0,
        on_state: Callable[[bool], None] | None = None,
        tls: TlsFiles = SYSTEM_TLS,
        identity: NatsIdentity = ANONYMOUS,
        max_outbox_bytes: int = 16 << 20,
    ) -> "NatsBroker":
        """Connect to the first of these servers (of one cluster) that answers; `on_state` then tells each loss and return.

        URLs are `nats://` or `tls://`, with `user:password@` or `token@`; the first credentials found serve all of them.
        Raises BrokerUnavailable where none answers in time, SettingsError where an URL is none or a file cannot be used.
        """
        broker = cls(urls, name=name, on_state=on_state, tls=tls, identity=identity, max_outbox_bytes=max_outbox_bytes)
        await broker._connection.open(connect_timeout_s)
        broker._start(connect_timeout_s)
        return broker

    @property
    def connected(self) -> bool:
        return self._connection.online.is_set()

    @property
    def max_payload_bytes(self) -> int:
        return self._connection.client.max_payload

    def counts(self) -> Mapping[str, int]:
        """For metrics: messages published, delivered, dropped; errors of the connection, of handlers; connections made."""
        return dict(self._counts)

    def publish(self, subject: str, payload: bytes) -> None:
        self._put(Outgoing(subject=subject, payload=payload))

    def respond(self, reply: str, payload: bytes) -> None:
        """Answer a message. One that came without a reply subject (its sender does not wait) drops the answer, counted."""
        if reply:
            self._put(Outgoing(subject=reply, payload=payload))
        else:
            self._counts["dropped"] += 1

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> bytes | None:
        return await self._ask(subject, payload, timeout_s=timeout_s)

    async def ping(self, *, timeout_s: float) -> bool:
        try:
            return await self._ask(None, b"ping", timeout_s=timeout_s) is not None
        except BrokerUnavailable:
            return False

    async def subscribe(self, subject: str, handler: Callable[[Message], None]) -> NatsSubscription:
        """Raises BrokerUnavailable, leaving nothing behind, where the server refuses it or does not confirm it."""

        def handle(came_on: str, payload: bytes, reply: str, status: str | None) -> None:
            self._counts["delivered"] += 1
            try:
                handler(_NatsMessage(self, came_on, payload, reply))
            except Exception:
                self._counts["handler_errors"] += 1
                logger.exception("broker_handler_failed", extra={"fields": {"subject": came_on}})

        subscription = self._connection.add(subject, handle)
        try:
            await self._confirm(subscription)
        except BaseException:
            await subscription.close()
            raise
        return subscription

    async def close(self) -> None:
        if self._closing:
            return
        if self.connected and not await self.ping(timeout_s=CLOSE_TIMEOUT_S):
            logger.warning("broker_flush_failed", extra={"fields": {"waiting_messages": len(self._outbox)}})
        self._closing = True
        self._counts["dropped"] += len(self._outbox)
        self._waiters.fail_all(BrokerUnavailable("the broker connection was closed"))
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._connection.close()

    async def _ask(self, subject: str | None, payload: bytes, *, timeout_s: float) -> bytes | None:
        """With no subject the question is its own answer: it comes back once the server has taken all that went before."""
        if not self.connected:
            raise BrokerUnavailable(f"not connected to {self._connection.shown_urls}")
        reply, waiter = self._waiters.open()
        try:
            if subject is None:
                self._put(Outgoing(subject=reply, payload=payload, waiter=waiter))
            else:
                self._put(Outgoing(subject=subject, payload=payload, reply=reply, waiter=waiter))
            return await await_reply(waiter, timeout_s=timeout_s)
        finally:
            self._waiters.close(reply)

    async def _confirm(self, subscription: NatsSubscription) -> None:
        """The server tells a refusal (no permission, a limit) before it answers the round trip."""
        client, servers = self._connection.client, self._connection.shown_urls
        earlier_error = client.last_error
        try:
            await subscription.attach(client)
        except errors.Error as error:
            raise BrokerUnavailable(f"cannot subscribe to {subscription.subject} at {servers}: {error}") from error
        confirmed = await self.ping(timeout_s=CONFIRM_TIMEOUT_S)
        if client.last_error is not None and client.last_error is not earlier_error:
            raise BrokerUnavailable(f"{servers} refused the subscription to {subscription.subject}: {client.last_error}")
        if not confirmed:
            raise BrokerUnavailable(f"{servers} did not confirm the subscription to {subscription.subject}")

    def _put(self, message: Outgoing) -> None:
        if self._closing:
            raise BrokerUnavailable("the broker connection was closed")
        if len(message.payload) > self.max_payload_bytes:
            raise PayloadTooLarge(
                f"a message of {len(message.payload)} bytes passes the broker's max_payload of {self.max_payload_bytes}"
            )
        self._outbox.put(message)
        self._counts["published"] += 1

    def _take_reply(self, subject: str, payload: bytes, reply: str, status: str | None) -> None:
        self._waiters.answer(subject, None if status == NO_RESPONDERS_STATUS else payload)

    def _take_state(self, online: bool) -> None:
        if not online:
            self._waiters.fail_all(BrokerUnavailable(f"the connection to {self._connection.shown_urls} was lost"))
        if self._on_state is not None and self._task is not None:
            self._on_state(online)

    def _start(self, connect_timeout_s: float) -> None:
        self._task = asyncio.create_task(self._run(connect_timeout_s), name=f"nats broker of {self._name}")
        self._task.add_done_callback(self._note_end_of_run)

    async def _run(self, connect_timeout_s: float) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._write())
            group.create_task(self._connection.keep_open(connect_timeout_s))

    async def _write(self) -> None:
        """Looks at `_closing` as well as being cancelled: nats-py swallows a cancellation while it flushes."""
        while not self._closing:
            await self._outbox.wait_filled()
            await self._connection.online.wait()
            if await self._sent_or_dropped(self._outbox.first()):
                self._outbox.drop_first()

    async def _sent_or_dropped(self, message: Outgoing) -> bool:
        """Hand one message to the client, waiting while its buffer is full. False where the connection was lost first."""
        if message.is_abandoned:
            return True
        try:
            await self._connection.client.publish(message.subject, message.payload, message.reply)
        except (errors.OutboundBufferLimitError, errors.ConnectionClosedError, OSError) as error:
            self._connection.lost(error)
            return False
        except errors.Error as error:  # a malformed subject, or a server came back that takes less than the last one did
            self._counts["dropped"] += 1
            logger.warning("broker_message_dropped", extra={"fields": {"subject": message.subject, "reason": str(error)}})
        return True

    def _note_end_of_run(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._connection.online.clear()
            self._waiters.fail_all(BrokerUnavailable("the broker's writer failed"))
            logger.critical("broker_writer_failed", exc_info=error)
