"""Who waits for which answer: one inbox per broker, one token per question.

The broker's own round trips (has the server seen all this?) are questions to its own inbox: unlike the client library's
PING they may be given up at any moment without harming the connection.
"""

import asyncio
import itertools

from common.values.errors import BrokerUnavailable

ReplyWaiter = asyncio.Future[bytes | BrokerUnavailable | None]
"""An answer; None where nobody subscribes; the error where the connection went. The error is a result, so that one whose
waiter was cancelled meanwhile leaves no unretrieved exception behind."""


class ReplyWaiters:
    """The questions that are open. `inbox` is the subject prefix that answers come to."""

    def __init__(self, inbox: str) -> None:
        self.inbox = inbox
        self._waiters: dict[str, ReplyWaiter] = {}
        self._tokens = itertools.count()

    def __len__(self) -> int:
        return len(self._waiters)

    @property
    def subject(self) -> str:
        """What to subscribe to for all answers."""
        return f"{self.inbox}.*"

    def open(self) -> tuple[str, ReplyWaiter]:
        """A fresh reply subject and its waiter. The caller closes it, whatever happened."""
        reply = f"{self.inbox}.{next(self._tokens)}"
        waiter: ReplyWaiter = asyncio.get_running_loop().create_future()
        self._waiters[reply] = waiter
        return reply, waiter

    def close(self, reply: str) -> None:
        waiter = self._waiters.pop(reply, None)
        if waiter is not None and not waiter.done():
            waiter.cancel()

    def answer(self, reply: str, payload: bytes | None) -> bool:
        """Hand an answer over; False where nobody waits for it (any more). Only the first answer counts."""
        waiter = self._waiters.get(reply)
        if waiter is None or waiter.done():
            return False
        waiter.set_result(payload)
        return True

    def fail_all(self, error: BrokerUnavailable) -> None:
        """The connection is lost: no answer to what was asked before can come any more."""
        for waiter in self._waiters.values():
            if not waiter.done():
                waiter.set_result(error)


async def await_reply(waiter: ReplyWaiter, *, timeout_s: float) -> bytes | None:
    """The answer, or None where none came in time. Raises BrokerUnavailable where the connection was lost meanwhile."""
    try:
        async with asyncio.timeout(timeout_s):
            answer = await waiter
    except TimeoutError:
        return None
    if isinstance(answer, BrokerUnavailable):
        raise answer
    return answer
