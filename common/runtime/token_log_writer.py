"""Writes what this worker emits to the token log in the store, so that another gateway can take a request over.

Off the hot path: a step only marks its sequences; several times a second all that is new goes out in one round trip.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable

from common.ports.state_store import StateStore
from common.protocol.messages import FrameEntry
from common.protocol.request_record import RUNNING_TTL_S
from common.protocol.subjects import Names
from common.protocol.token_log import SequenceLog
from common.protocol.token_log_backlog import TokenLogBacklog
from common.runtime.failpoints import Failpoints
from common.values.errors import StoreUnavailable
from common.values.ids import Incarnation, SequenceKey

INTERVAL_S = 0.1
RETRY_S = 1.0
logger = logging.getLogger(__name__)


class TokenLogWriter:
    """`find` gives the worker's own log of a sequence, None where it is gone: cancelled, or long over."""

    def __init__(
        self,
        store: StateStore,
        names: Names,
        incarnation: Incarnation,
        find: Callable[[SequenceKey], SequenceLog | None],
        failpoints: Failpoints,
    ) -> None:
        self._backlog = TokenLogBacklog(incarnation, find)
        self._store = store
        self._names = names
        self._failpoints = failpoints
        self._marked = asyncio.Event()

    @property
    def counts(self) -> Counter[str]:
        return self._backlog.counts

    def mark(self, entries: Iterable[FrameEntry]) -> None:
        """These tokens have just been emitted."""
        self._backlog.mark(entries)
        self._marked.set()

    async def run(self) -> None:
        while True:
            await self._marked.wait()
            await asyncio.sleep(INTERVAL_S)
            if not await self.flush():
                await asyncio.sleep(RETRY_S)
            if self._backlog.is_empty:
                self._marked.clear()

    async def flush(self) -> bool:
        """Write what is new; False where the store could not take it (it is tried again)."""
        parts = self._backlog.take()
        lists = self._backlog.entries(parts)
        names = {request: self._names.log_key(request) for request in lists}
        try:
            lengths = await self._store.append({names[request]: entries for request, entries in lists.items()}, ttl_s=RUNNING_TTL_S)
        except StoreUnavailable as error:
            logger.warning("tokens_not_logged", extra={"fields": {"sequences": len(parts), "reason": str(error)}})
            self._backlog.failed(parts)
            return False
        if lists:
            self._failpoints.hit("log.appended")
        self._backlog.written(parts, {request: lengths[name] for request, name in names.items()})
        return True
