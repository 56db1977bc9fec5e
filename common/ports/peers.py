"""Control connections between two workers: ordered, authenticated, small messages."""

from collections.abc import Callable
from typing import Protocol


class PeerConnection(Protocol):
    """One authenticated connection. Messages arrive whole and in order, or the connection is lost."""

    @property
    def address(self) -> str:
        """For logs: host:port."""
        ...

    def send(self, payload: bytes) -> None:
        """Queue a message. Never blocks; once the bounded outbox is full, or the connection lost, it is closed and
        messages are dropped: `on_lost` tells."""
        ...

    def listen(self, on_message: Callable[[bytes], None], on_lost: Callable[[str], None]) -> None:
        """Set the two callbacks, once; messages that came earlier are delivered first. Both run on the event loop;
        `on_lost` is called exactly once, with a reason, unless we closed the connection ourselves."""
        ...

    async def close(self) -> None: ...


class PeerNetwork(Protocol):
    """Dials and listens. Both sides prove knowledge of the cluster key (mutual HMAC over fresh nonces) before a byte of
    payload passes."""

    async def listen(self, on_connection: Callable[[PeerConnection], None]) -> tuple[str, int]:
        """Accept peers; returns the host and port to announce."""
        ...

    async def dial(self, host: str, port: int, *, timeout_s: float) -> PeerConnection:
        """Raises PeerError where the peer cannot be reached, or does not know the key."""
        ...

    async def close(self) -> None: ...
