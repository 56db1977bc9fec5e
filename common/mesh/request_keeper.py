"""The requests that this gateway owns, and their records in the store: kept while they run, written again where they were
lost, closed at the end.

Whatever the store does, running requests go on; what could not be written is written when it is back. Nothing is awaited
but the store.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from common.mesh.attachment import Attachable, EndedElsewhere, Ours, TakenOver
from common.mesh.request_progress import RequestProgress
from common.mesh.request_store import RequestStore
from common.protocol.request_record import RENEWAL_S, RequestRecord
from common.values.errors import BrokerUnavailable, SegueError, StoreUnavailable, StreamNotFound, Unavailable
from common.values.ids import RequestId

MAX_TAKE_OVERS = 4
"""Tries, where other gateways take the same request over at the same time."""
LINGER_S = 30.0
"""How long a request that can be resumed lives on without a reader."""
MAX_LINGERING = 1024
logger = logging.getLogger(__name__)
Owned = TypeVar("Owned", bound=RequestProgress)


class RequestKeeper(Generic[Owned]):
    """`on_lost` is told of a request that another gateway has taken over."""

    def __init__(self, records: RequestStore, *, clock: Callable[[], float], on_lost: Callable[[RequestId], None]) -> None:
        self._records = records
        self._clock = clock
        self._on_lost = on_lost
        self._owned: dict[RequestId, Owned] = {}
        self._unrecorded: set[RequestId] = set()
        self._closing: dict[RequestId, Owned] = {}  # they have ended, and their records do not say so yet
        self._renewed_at = clock()

    def __iter__(self) -> Iterator[Owned]:
        return iter(list(self._owned.values()))

    def get(self, request_id: RequestId) -> Owned | None:
        return self._owned.get(request_id)

    def add(self, owned: Owned) -> None:
        self._owned[owned.request_id] = owned

    def remove(self, request_id: RequestId) -> Owned:
        self._unrecorded.discard(request_id)
        return self._owned.pop(request_id)

    def end_unread(self) -> int:
        """End what nobody has read for too long, and the oldest where too many linger. Returns how many."""
        lingering = [(owned.unread_since, owned) for owned in self._owned.values() if owned.unread_since is not None]
        lingering.sort(key=lambda pair: pair[0])
        over = [
            owned
            for place, (since, owned) in enumerate(lingering)
            if self._clock() - since > LINGER_S or len(lingering) - place > MAX_LINGERING
        ]
        for owned in over:
            owned.cancel(None)
        return len(over)

    async def keep(self) -> None:
        """Call it once a second: after an empty restart of the store, or where an attempt could not be recorded, records are
        written again within a second or so."""
        try:
            if await self._records.was_emptied():
                self._unrecorded.update(owned.request_id for owned in self if owned.is_recorded)
            for request_id in list(self._unrecorded):
                await self._restore(request_id)
            if self._clock() - self._renewed_at >= RENEWAL_S:
                self._renewed_at = self._clock()
                await self._renew_all()
        except StoreUnavailable as error:
            logger.warning("records_not_kept", extra={"fields": {"reason": str(error)}})

    async def record_placement(self, owned: Owned) -> bool:
        """The record shows an attempt before its worker is told. Without the store nothing new is admitted
        (StoreUnavailable); a request that runs already may be placed again all the same. False where there is nothing to
        dispatch any more."""
        if owned.is_recorded:
            await self._record_attempt(owned)
        else:
            await self._records.admit(owned)
            if owned.request_id not in self._owned:  # it ended meanwhile, when there was no record to write that into
                await self.record_end(owned, None)
        return owned.request_id in self._owned

    async def attach(self, request_id: RequestId, tenant: str, *, may_take: Callable[[], bool]) -> Attachable[Owned]:
        """Find a request wherever it is, and take it over where it is another gateway's. One call at a time for each request.
        Raises StreamNotFound, Unavailable."""
        for _ in range(MAX_TAKE_OVERS):
            closing = self._closing.get(request_id)
            if closing is not None and closing.request.tenant == tenant:
                return Ours(owned=closing)
            record = await self._record_of(request_id)
            owned = self._owned.get(request_id)
            if owned is not None and owned.request.tenant == tenant:
                if record is None or self._records.is_ours(record, owned):
                    return Ours(owned=owned)
                self._on_lost(request_id)  # somebody has taken it over, and we had not heard yet
            if record is None or record.facts.tenant != tenant:
                raise StreamNotFound("there is no such stream, or it ended too long ago")
            if record.state != "running":
                return EndedElsewhere(record=record, log=await self._records.log(request_id))
            if not may_take():
                raise BrokerUnavailable("the message broker is not connected", retry_after_s=2.0)
            epoch = await self._records.take_over(request_id, record)
            if epoch is not None:
                return TakenOver(record=record, epoch=epoch, log=await self._records.log(request_id))
        raise Unavailable("other gateways are taking this stream over", retry_after_s=1.0)

    async def _record_attempt(self, owned: Owned) -> None:
        """A later attempt than the first, before its worker is told; without the store it is tried all the same."""
        try:
            if await self._records.record_attempt(owned) == "lost":
                self._on_lost(owned.request_id)
        except StoreUnavailable as error:
            self._log("attempt_not_recorded", owned, error)
            if owned.request_id in self._owned:
                self._unrecorded.add(owned.request_id)

    async def record_end(self, owned: Owned, error: SegueError | None) -> None:
        self._closing[owned.request_id] = owned
        try:
            await self._records.record_end(owned, error, self._clock())
        except StoreUnavailable as unavailable:
            self._log("end_not_recorded", owned, unavailable)
        finally:
            self._closing.pop(owned.request_id, None)

    async def record_choice(self, owned: Owned, choice: int) -> None:
        """One that we ended, while others go on."""
        try:
            await self._records.record_choice(owned, choice)
        except StoreUnavailable as error:
            self._log("choice_not_recorded", owned, error)

    async def _record_of(self, request_id: RequestId) -> RequestRecord | None:
        """None also for a request of ours while the store is away: nobody takes over then."""
        try:
            return await self._records.find(request_id)
        except StoreUnavailable:
            if request_id in self._owned:
                return None
            raise

    async def _restore(self, request_id: RequestId) -> None:
        owned = self._owned.get(request_id)
        if owned is not None and await self._records.restore(owned) == "lost":
            self._on_lost(request_id)
        self._unrecorded.discard(request_id)

    async def _renew_all(self) -> None:
        for owned in self:
            if owned.is_recorded and not await self._records.renew(owned):
                self._unrecorded.add(owned.request_id)

    def _log(self, event: str, owned: Owned, error: SegueError) -> None:
        logger.warning(event, extra={"fields": {"request": owned.request_id, "reason": str(error)}})
