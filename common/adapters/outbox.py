"""What a broker was given to send and has not sent: in order, and bounded in bytes.

The mesh publishes from synchronous code, so a send cannot wait for room; past the bound it is refused, and the caller
learns at once that the broker is away or cannot keep up, instead of the process growing until it dies.
"""

import asyncio
from collections import deque
from dataclasses import dataclass

from common.adapters.reply_waiters import ReplyWaiter
from common.values.errors import BrokerUnavailable

ENTRY_OVERHEAD_BYTES = 128
"""Charged for each message on top of its bytes, so that very many empty messages are bounded as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """One message to send. One whose `waiter` has given up need not be sent any more."""

    subject: str
    payload: bytes
    reply: str = ""
    waiter: ReplyWaiter | None = None

    @property
    def size_bytes(self) -> int:
        return ENTRY_OVERHEAD_BYTES + len(self.subject) + len(self.payload)

    @property
    def is_abandoned(self) -> bool:
        return self.waiter is not None and self.waiter.done()


class Outbox:
    """A queue with one reader, who takes the first message off only after sending it."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._messages: deque[Outgoing] = deque()
        self._bytes = 0
        self._filled = asyncio.Event()

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def size_bytes(self) -> int:
        return self._bytes

    def put(self, message: Outgoing) -> None:
        """Raises BrokerUnavailable, keeping nothing, where the message would pass the bound."""
        if self._bytes + message.size_bytes > self._max_bytes:
            raise BrokerUnavailable(f"the broker is away or too slow: {self._bytes} bytes wait to be sent (bound {self._max_bytes})")
        self._messages.append(message)
        self._bytes += message.size_bytes
        self._filled.set()

    def first(self) -> Outgoing:
        return self._messages[0]

    def drop_first(self) -> None:
        self._bytes -= self._messages.popleft().size_bytes
        if not self._messages:
            self._filled.clear()

    async def wait_filled(self) -> None:
        await self._filled.wait()
