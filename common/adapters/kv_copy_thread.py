"""The one thread of a process that copies KV bytes and takes checksums, so that the event loop never does.

It carries the cancellation law of transfers: whoever is cancelled while their work runs goes on only when it has finished.
So when a pull has returned, raised or been cancelled, nothing writes into its landing blocks any more.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class CopyThread:
    """Runs blocking functions one after the other. Give it pieces of a few milliseconds: cancelling waits for the current one."""

    def __init__(self, name: str = "kv-copy") -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def run(self, work: Callable[[], T]) -> T:
        """`work()` in the thread. When cancelled, work that has not begun is dropped and work that has is waited for."""
        running = self._executor.submit(work)
        waiter = asyncio.wrap_future(running)
        try:
            return await asyncio.shield(waiter)
        except asyncio.CancelledError:
            running.cancel()
            while not waiter.done():
                try:
                    await asyncio.wait([waiter])
                except asyncio.CancelledError:
                    continue
            if not waiter.cancelled():
                waiter.exception()
            raise

    async def close(self) -> None:
        """Let the current work finish, and end the thread."""
        await asyncio.get_running_loop().run_in_executor(None, self._executor.shutdown)
