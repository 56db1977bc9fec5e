"""The requests that this gateway owns, and their records in the store: kept while they run, written again where they were
lost, closed at the end.

Whatever the store does, running requests go on; what could not be written is written when it is back.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator

from common.protocol.request_record import RENEWAL_S
from common.values.errors import SegueError, StoreUnavailable
from common.values.ids import RequestId
from services.gateway.live_generation import OwnedRequest
from services.gateway.request_store import RequestStore

KEEPING_S = 1.0
LINGER_S = 30.0
"""How long a request that can be resumed lives on without a reader."""
MAX_LINGERING = 1024
logger = logging.getLogger(__name__)


class RequestKeeper:
    """`on_lost` is told of a request that another gateway has taken over."""

    def __init__(self, records: RequestStore, *, clock: Callable[[], float], on_lost: Callable[[RequestId], None]) -> None:
        self._records = records
        self._clock = clock
        self._on_lost = on_lost
        self._owned: dict[RequestId, OwnedRequest] = {}
        self._unrecorded: set[RequestId] = set()
        self._closing: dict[RequestId, OwnedRequest] = {}

    def __iter__(self) -> Iterator[OwnedRequest]:
        return iter(list(self._owned.values()))

    def get(self, request_id: RequestId) -> OwnedRequest | None:
        return self._owned.get(request_id)

    def closing(self, request_id: RequestId) -> OwnedRequest | None:
        """A request that has ended, while its record does not say so yet."""
        return self._closing.get(request_id)

    def add(self, owned: OwnedRequest) -> None:
        self._owned[owned.request_id] = owned

    def remove(self, request_id: RequestId) -> OwnedRequest:
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

    async def run(self) -> None:
        """Until cancelled. After an empty restart of the store, or where an attempt could not be recorded, records are written
        again within a second or so."""
        renewed_at = self._clock()
        while True:
            await asyncio.sleep(KEEPING_S)
            try:
                if await self._records.was_emptied():
                    self._unrecorded.update(owned.request_id for owned in self if owned.is_recorded)
                for request_id in list(self._unrecorded):
                    await self._restore(request_id)
                if self._clock() - renewed_at >= RENEWAL_S:
                    renewed_at = self._clock()
                    await self._renew_all()
            except StoreUnavailable as error:
                logger.warning("records_not_kept", extra={"fields": {"reason": str(error)}})

    async def record_attempt(self, owned: OwnedRequest) -> None:
        """A later attempt than the first, before its worker is told; without the store it is tried all the same."""
        try:
            if await self._records.record_attempt(owned) == "lost":
                self._on_lost(owned.request_id)
        except StoreUnavailable as error:
            self._log("attempt_not_recorded", owned, error)
            if owned.request_id in self._owned:
                self._unrecorded.add(owned.request_id)

    async def record_end(self, owned: OwnedRequest, error: SegueError | None) -> None:
        self._closing[owned.request_id] = owned
        try:
            await self._records.record_end(owned, error, self._clock())
        except StoreUnavailable as unavailable:
            self._log("end_not_recorded", owned, unavailable)
        finally:
            self._closing.pop(owned.request_id, None)

    async def record_choice(self, owned: OwnedRequest, choice: int) -> None:
        """One that we ended, while others go on."""
        try:
            await self._records.record_choice(owned, choice)
        except StoreUnavailable as error:
            self._log("choice_not_recorded", owned, error)

    async def _restore(self, request_id: RequestId) -> None:
        owned = self._owned.get(request_id)
        if owned is not None and await self._records.restore(owned) == "lost":
            self._on_lost(request_id)
        self._unrecorded.discard(request_id)

    async def _renew_all(self) -> None:
        for owned in self:
            if owned.is_recorded and not await self._records.renew(owned):
                self._unrecorded.add(owned.request_id)

    def _log(self, event: str, owned: OwnedRequest, error: SegueError) -> None:
        logger.warning(event, extra={"fields": {"request": owned.request_id, "reason": str(error)}})
