"""Publish, subscribe, ask: what the mesh needs from a message broker."""

from collections.abc import Callable
from typing import Protocol


class Message(Protocol):
    """A message as it arrived. `respond` may be called once, and only where the sender awaits an answer."""

    @property
    def subject(self) -> str: ...
    @property
    def payload(self) -> bytes: ...
    def respond(self, payload: bytes) -> None: ...


class Subscription(Protocol):
    async def close(self) -> None: ...


class Broker(Protocol):
    """Delivery is at most once and ordered per publisher and subject; Segue's own fencing is the truth, not the broker.

    `publish` and `Message.respond` are synchronous: they queue in order in a bounded buffer and return; they raise
    `BrokerUnavailable` when the buffer is full (while there is no connection they still queue), `PayloadTooLarge` past
    `max_payload_bytes`. An answer to a message whose sender awaits none is dropped. A lost connection mends itself, and
    subscriptions with it; what was under way is lost. Handlers are synchronous, are called on the event loop one message at a
    time in order of arrival, and must not raise.
    """

    @property
    def connected(self) -> bool: ...

    @property
    def max_payload_bytes(self) -> int: ...

    def publish(self, subject: str, payload: bytes) -> None: ...

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> bytes | None:
        """The first answer, or None where nobody subscribes or none came in time.

        Raises BrokerUnavailable where there is no connection, or it is lost before the answer.
        """
        ...

    async def subscribe(self, subject: str, handler: Callable[[Message], None]) -> Subscription:
        """`subject` may hold NATS wildcards (`*`, `>`). Returns once the server has the subscription.

        Raises BrokerUnavailable, leaving nothing behind, where there is no connection or the server refuses.
        """
        ...

    async def ping(self, *, timeout_s: float) -> bool:
        """Whether the broker itself answers."""
        ...

    async def close(self) -> None:
        """Flushes what was published, then disconnects."""
        ...
