"""Writes what this worker emits to the token log in the store, so that another gateway can take a request over.

Off the hot path: a step only marks its sequences; several times a second all that is new goes out in one round trip. The
worker's own log is what is written, so nothing is kept twice. After an error, or where the store came back empty, a sequence
is written again from its first token on.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable

from common.ports.state_store import StateStore
from common.protocol.messages import FrameEntry
from common.protocol.request_record import RUNNING_TTL_S
from common.protocol.stored_log import LogEntry, encode_entry
from common.protocol.subjects import Names
from common.protocol.token_log import SequenceLog
from common.runtime.failpoints import Failpoints
from common.values.errors import StoreUnavailable
from common.values.ids import Incarnation, RequestId, SequenceKey
from common.values.tokens import NewTokens

INTERVAL_S = 0.1
RETRY_S = 1.0
MAX_BATCH = 1024
logger = logging.getLogger(__name__)
_Batch = list[tuple[SequenceKey, SequenceLog, NewTokens]]


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
        self.counts: Counter[str] = Counter(entries=0, tokens=0, errors=0, restarts=0)
        self._store = store
        self._names = names
        self._incarnation = incarnation
        self._find = find
        self._failpoints = failpoints
        self._new: dict[SequenceKey, None] = {}
        self._marked = asyncio.Event()

    def mark(self, entries: Iterable[FrameEntry]) -> None:
        """These tokens have just been emitted."""
        for entry in entries:
            self._new[SequenceKey(RequestId(entry.request_id), entry.choice)] = None
        self._marked.set()

    async def run(self) -> None:
        while True:
            await self._marked.wait()
            await asyncio.sleep(INTERVAL_S)
            if not await self.flush():
                await asyncio.sleep(RETRY_S)

    async def flush(self) -> bool:
        """Write what is new; False where the store could not take it (it is tried again)."""
        batch = self._take_batch()
        lists: dict[str, list[bytes]] = {}
        for key, log, new in batch:
            entry = LogEntry(choice=key.choice, attempt=log.attempt, writer=self._incarnation, new=new)
            lists.setdefault(self._names.log_key(key.request_id), []).append(encode_entry(entry))
        try:
            lengths = await self._store.append(lists, ttl_s=RUNNING_TTL_S)
        except StoreUnavailable as error:
            self.counts["errors"] += 1
            logger.warning("tokens_not_logged", extra={"fields": {"sequences": len(batch), "reason": str(error)}})
            for key, log, _ in batch:
                self._begin_again(key, log)
            return False
        if lists:
            self._failpoints.hit("log.appended")
        for key, log, new in batch:
            self._written(key, log, new, lengths[self._names.log_key(key.request_id)])
        return True

    def _take_batch(self) -> _Batch:
        batch: _Batch = []
        for key in list(self._new)[:MAX_BATCH]:
            del self._new[key]
            log = self._find(key)
            new = None if log is None else log.not_stored()
            if log is not None and new is not None:
                batch.append((key, log, new))
        if not self._new:
            self._marked.clear()
        return batch

    def _written(self, key: SequenceKey, log: SequenceLog, new: NewTokens, length: int) -> None:
        self.counts["entries"] += 1
        self.counts["tokens"] += len(new.tokens)
        log.stored_tokens = new.first + len(new.tokens)
        log.stored_entries += 1
        if length < log.stored_entries:  # the list is younger than what was written to it
            self.counts["restarts"] += 1
            self._begin_again(key, log)

    def _begin_again(self, key: SequenceKey, log: SequenceLog) -> None:
        log.stored_tokens = log.stored_entries = 0
        self._new[key] = None
        self._marked.set()
