"""The broker port within one process: for tests, and for a whole mesh on one event loop.

It keeps what the mesh may rely on with NATS (order per publisher and subject, wildcards, no answer where nobody listens,
size and buffer bounds) and loses what NATS may lose: whatever is under way to a broker that is disconnected.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass

from common.adapters.outbox import Outbox, Outgoing
from common.adapters.reply_waiters import ReplyWaiters, await_reply
from common.ports.broker import Message
from common.values.errors import BrokerUnavailable, PayloadTooLarge

logger = logging.getLogger(__name__)


def subject_matches(pattern: str, subject: str) -> bool:
    """NATS wildcards: `*` is exactly one token, `>` at the end is one or more."""
    wanted, given = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        wanted.pop()
        if len(given) <= len(wanted):
            return False
        given = given[: len(wanted)]
    return len(wanted) == len(given) and all(want in ("*", have) for want, have in zip(wanted, given, strict=True))


class MemoryHub:
    """What the brokers of one mesh share: the server, so to say. `stop` and `start` are its death and its return."""

    def __init__(self, *, max_payload_bytes: int = 1 << 20) -> None:
        self.max_payload_bytes = max_payload_bytes
        self._running = True
        self._brokers: list[MemoryBroker] = []
        self._numbers = itertools.count()

    def connect(self, *, on_state: Callable[[bool], None] | None = None, max_outbox_bytes: int = 16 << 20) -> "MemoryBroker":
        if not self._running:
            raise BrokerUnavailable("the hub is stopped")
        broker = MemoryBroker(self, f"_INBOX.memory{next(self._numbers)}", on_state=on_state, max_outbox_bytes=max_outbox_bytes)
        self._brokers.append(broker)
        broker.reconnect()
        return broker

    @property
    def running(self) -> bool:
        return self._running

    def stop(self) -> None:
        self._running = False
        for broker in self._brokers:
            broker.disconnect()

    def start(self) -> None:
        self._running = True
        for broker in self._brokers:
            broker.reconnect()

    def route(self, message: Outgoing) -> bool:
        """Hand a message to every subscription that wants it; False where there is none."""
        taken = [broker.offer(message) for broker in self._brokers if broker.connected]
        return any(taken)

    def leave(self, broker: "MemoryBroker") -> None:
        self._brokers.remove(broker)


@dataclass(frozen=True, slots=True)
class _MemoryMessage:
    broker: "MemoryBroker"
    subject: str
    payload: bytes
    reply: str

    def respond(self, payload: bytes) -> None:
        if self.reply:
            self.broker.publish(self.reply, payload)


class _MemorySubscription:
    def __init__(self, broker: "MemoryBroker", subject: str, handler: Callable[[Message], None]) -> None:
        self.subject = subject
        self._broker = broker
        self._handler = handler
        self._closed = False

    def deliver(self, message: Outgoing) -> None:
        if self._closed or not self._broker.connected:
            return
        try:
            self._handler(_MemoryMessage(self._broker, message.subject, message.payload, message.reply))
        except Exception:
            logger.exception("broker_handler_failed", extra={"fields": {"subject": message.subject}})

    async def close(self) -> None:
        self._closed = True
        self._broker.forget(self)


class MemoryBroker:
    """Made by `MemoryHub.connect`. `disconnect` and `reconnect` cut and mend this one's connection."""

    def __init__(self, hub: MemoryHub, inbox: str, *, on_state: Callable[[bool], None] | None, max_outbox_bytes: int) -> None:
        self._hub = hub
        self._on_state = on_state
        self._outbox = Outbox(max_outbox_bytes)
        self._waiters = ReplyWaiters(inbox)
        self._subscriptions = [_MemorySubscription(self, self._waiters.subject, self._take_reply)]
        self._loop = asyncio.get_running_loop()
        self._connected = False
        self._was_connected = False
        self._closed = False
        self._drain_scheduled = False

    @property
    def connected(self) -> bool:
        return self._connected

    @property
    def max_payload_bytes(self) -> int:
        return self._hub.max_payload_bytes

    def publish(self, subject: str, payload: bytes) -> None:
        self._put(Outgoing(subject=subject, payload=payload))

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> bytes | None:
        if not self._connected:
            raise BrokerUnavailable("the hub is not connected")
        reply, waiter = self._waiters.open()
        try:
            self._put(Outgoing(subject=subject, payload=payload, reply=reply, waiter=waiter))
            return await await_reply(waiter, timeout_s=timeout_s)
        finally:
            self._waiters.close(reply)

    async def subscribe(self, subject: str, handler: Callable[[Message], None]) -> _MemorySubscription:
        if not self._connected:
            raise BrokerUnavailable(f"the hub is not connected: cannot subscribe to {subject}")
        subscription = _MemorySubscription(self, subject, handler)
        self._subscriptions.append(subscription)
        return subscription

    async def ping(self, *, timeout_s: float) -> bool:
        try:
            return await self.request(f"{self._waiters.inbox}.ping", b"", timeout_s=timeout_s) is not None
        except BrokerUnavailable:
            return False

    async def close(self) -> None:
        if self._closed:
            return
        self._drain()
        self._closed = True
        self._connected = False
        self._waiters.fail_all(BrokerUnavailable("the broker connection was closed"))
        self._hub.leave(self)

    def disconnect(self) -> None:
        if self._connected:
            self._connected = False
            self._waiters.fail_all(BrokerUnavailable("the connection to the hub was lost"))
            self._tell_state()

    def reconnect(self) -> None:
        """Does nothing while the hub is stopped."""
        if self._connected or self._closed or not self._hub.running:
            return
        self._connected = True
        self._schedule_drain()
        if self._was_connected:
            self._tell_state()
        self._was_connected = True

    def offer(self, message: Outgoing) -> bool:
        """Called by the hub: each delivery is a callback of its own, so that handlers never nest."""
        wanting = [subscription for subscription in self._subscriptions if subject_matches(subscription.subject, message.subject)]
        for subscription in wanting:
            self._loop.call_soon(subscription.deliver, message)
        return bool(wanting)

    def forget(self, subscription: _MemorySubscription) -> None:
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)

    def _put(self, message: Outgoing) -> None:
        if self._closed:
            raise BrokerUnavailable("the broker connection was closed")
        if len(message.payload) > self.max_payload_bytes:
            raise PayloadTooLarge(
                f"a message of {len(message.payload)} bytes passes the hub's max_payload of {self.max_payload_bytes}"
            )
        self._outbox.put(message)
        self._schedule_drain()

    def _schedule_drain(self) -> None:
        if self._connected and not self._drain_scheduled:
            self._drain_scheduled = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._drain_scheduled = False
        while self._connected and len(self._outbox):
            message = self._outbox.first()
            if not message.is_abandoned and not self._hub.route(message) and message.reply:
                self._waiters.answer(message.reply, None)
            self._outbox.drop_first()

    def _take_reply(self, message: Message) -> None:
        if message.subject == f"{self._waiters.inbox}.ping":
            message.respond(b"")
        else:
            self._waiters.answer(message.subject, message.payload)

    def _tell_state(self) -> None:
        if self._on_state is not None:
            self._on_state(self._connected)
