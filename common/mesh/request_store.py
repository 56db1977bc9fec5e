"""The store as one gateway uses it: its request records, their token logs, and the requests of idempotency keys.

Every write to a record of ours is a compare-and-set on owner and epoch. Where it fails because the record is gone (the store
was emptied) it is written again; where another gateway stands in it, the request is lost to us. Nothing is awaited but the
store.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Literal

from common.mesh.request_moments import moments
from common.mesh.request_progress import RequestProgress
from common.ports.state_store import StateStore
from common.protocol.request_record import (
    ENDED_TTL_S,
    RESERVED_TTL_S,
    RUNNING_TTL_S,
    IdempotencyMark,
    RecordedError,
    RecordState,
    RequestFacts,
    RequestRecord,
    attempt_change,
    ending_change,
    first_record,
    ownership,
    parse_record,
)
from common.protocol.stored_log import LogEntry, StoredChoice, assemble, decode_entry, encode_entry
from common.protocol.subjects import Names
from common.values.errors import PeerError, RequestError, RequestFailed, SegueError, StoreUnavailable, Unavailable
from common.values.ids import GatewayId, Incarnation, RequestId

MARK_TTL_S = 60.0
Standing = Literal["ours", "lost"]
logger = logging.getLogger(__name__)


class RequestStore:
    """`wall_clock` gives the time of day for people; nothing is decided by it."""

    def __init__(
        self, store: StateStore, names: Names, *, gateway: GatewayId, incarnation: Incarnation, wall_clock: Callable[[], float]
    ) -> None:
        self._store = store
        self._names = names
        self._gateway = gateway
        self._incarnation = incarnation
        self._wall_clock = wall_clock

    # ------------------------------------------------------------------ records of ours

    async def admit(self, owned: RequestProgress) -> None:
        """Before the first dispatch is sent. Raises StoreUnavailable: without a record nothing is admitted."""
        mark = owned.request.idempotency
        if not await self._store.create(self._key(owned), self._record(owned), ttl_s=RUNNING_TTL_S):
            # placed again before its first admission was answered, or created by a write that we had given up
            change = attempt_change(owned.attempt, owned.worker, owned.decode_worker)
            if not await self._change(owned, change, ttl_s=RUNNING_TTL_S):
                raise StoreUnavailable("a request of this id is there already", retry_after_s=1.0)
        owned.is_recorded = True
        if mark is not None:
            await self._store.refresh(self._names.idempotency_key(mark.key), ttl_s=RUNNING_TTL_S)

    async def record_attempt(self, owned: RequestProgress) -> Standing:
        """A later attempt, before its worker is told. Raises StoreUnavailable."""
        change = attempt_change(owned.attempt, owned.worker, owned.decode_worker)
        if await self._change(owned, change, ttl_s=RUNNING_TTL_S):
            return "ours"
        return await self.restore(owned)

    async def restore(self, owned: RequestProgress) -> Standing:
        """Write the record again where it is gone. Raises StoreUnavailable."""
        mark = owned.request.idempotency
        if await self._store.create(self._key(owned), self._record(owned), ttl_s=RUNNING_TTL_S):
            logger.info("record_restored", extra={"fields": {"request": owned.request_id}})
            if mark is not None:
                fields = {"request": owned.request_id.encode(), "digest": mark.digest}
                await self._store.put(self._names.idempotency_key(mark.key), fields, ttl_s=RUNNING_TTL_S)
            return "ours"
        mine = ownership(self._gateway, owned.epoch)
        return "ours" if await self._change(owned, mine, ttl_s=RUNNING_TTL_S) else "lost"

    async def renew(self, owned: RequestProgress) -> bool:
        """False where the record is gone. Raises StoreUnavailable."""
        mark = owned.request.idempotency
        if mark is not None:
            await self._store.refresh(self._names.idempotency_key(mark.key), ttl_s=RUNNING_TTL_S)
        await self._store.refresh(self._names.log_key(owned.request_id), ttl_s=RUNNING_TTL_S)
        return await self._store.refresh(self._key(owned), ttl_s=RUNNING_TTL_S)

    async def record_end(self, owned: RequestProgress, error: SegueError | None, now: float) -> None:
        """The whole log first: whoever reads that a request has ended finds all its tokens. Raises StoreUnavailable."""
        if not owned.is_recorded:
            return
        await self._append(owned, range(len(owned.choices)), ttl_s=ENDED_TTL_S)
        seconds = moments(
            end_s=now - owned.started,
            first_token_s=None if owned.first_token is None else owned.first_token - owned.started,
            stages={} if owned.account is None else owned.account.stages,
        )
        state: RecordState = "failed" if error is not None else "cancelled" if owned.is_cancelled else "ended"
        change = ending_change(
            state,
            seconds=seconds,
            tokens=owned.tokens,
            error=recorded_error(owned.error),
            keep_prompt=owned.request.keep_prompt,
            account=owned.account,
        )
        await self._change(owned, change, ttl_s=ENDED_TTL_S)
        if owned.request.idempotency is not None:
            await self._store.refresh(self._names.idempotency_key(owned.request.idempotency.key), ttl_s=ENDED_TTL_S)

    async def record_choice(self, owned: RequestProgress, choice: int) -> None:
        """A choice that we ended, while others go on: its worker writes no more of it. Raises StoreUnavailable."""
        await self._append(owned, [choice], ttl_s=RUNNING_TTL_S)

    def is_ours(self, record: RequestRecord, owned: RequestProgress) -> bool:
        return (record.owner, record.epoch) == (self._gateway, owned.epoch)

    async def was_emptied(self) -> bool:
        """Whether the store has lost what we wrote since we last asked. Raises StoreUnavailable."""
        key = self._names.gateway_key(self._gateway)
        if await self._store.refresh(key, ttl_s=MARK_TTL_S):
            return False
        await self._store.put(key, {"incarnation": self._incarnation.encode()}, ttl_s=MARK_TTL_S)
        return True

    # ------------------------------------------------------------------ records of others

    async def find(self, request_id: RequestId) -> RequestRecord | None:
        """Raises StoreUnavailable."""
        fields = await self._store.read(self._names.request_key(request_id))
        if fields is None:
            return None
        try:
            return parse_record(fields)
        except PeerError as error:
            logger.warning("malformed_record", extra={"fields": {"request": request_id, "reason": str(error)}})
            return None

    async def take_over(self, request_id: RequestId, record: RequestRecord) -> int | None:
        """Become the owner; the new epoch, or None where somebody else was quicker. Raises StoreUnavailable."""
        epoch = record.epoch + 1
        taken = await self._store.update_if(
            self._names.request_key(request_id),
            expected={**ownership(record.owner, record.epoch), "state": b"running"},
            changes=ownership(self._gateway, epoch),
            ttl_s=RUNNING_TTL_S,
        )
        return epoch if taken else None

    async def log(self, request_id: RequestId) -> dict[int, StoredChoice]:
        """Raises StoreUnavailable."""
        entries: list[LogEntry] = []
        for data in await self._store.read_list(self._names.log_key(request_id)):
            try:
                entries.append(decode_entry(data))
            except PeerError as error:
                logger.warning("malformed_log_entry", extra={"fields": {"request": request_id, "reason": str(error)}})
        return assemble(entries)

    # ------------------------------------------------------------------ idempotency keys

    async def claim(self, mark: IdempotencyMark, request_id: RequestId) -> tuple[RequestId, bytes]:
        """The request that this key belongs to from now on, and the digest it came with. Raises StoreUnavailable."""
        fields = {"request": request_id.encode(), "digest": mark.digest}
        key = self._names.idempotency_key(mark.key)
        while True:
            if await self._store.create(key, fields, ttl_s=RESERVED_TTL_S):
                return request_id, mark.digest
            known = await self._store.read(key)
            if known is not None:  # else it expired between the two
                return RequestId(known["request"].decode()), known["digest"]

    async def release(self, mark: IdempotencyMark, request_id: RequestId) -> None:
        """The request was not admitted: its key is free again. Where the store is away, it is so after a while."""
        key = self._names.idempotency_key(mark.key)
        try:
            known = await self._store.read(key)
            if known is not None and known.get("request") == request_id.encode():
                await self._store.delete(key)
        except StoreUnavailable as error:
            logger.warning("key_not_released", extra={"fields": {"reason": str(error)}})

    # ------------------------------------------------------------------ private

    def _key(self, owned: RequestProgress) -> str:
        return self._names.request_key(owned.request_id)

    async def _change(self, owned: RequestProgress, change: dict[str, bytes], *, ttl_s: float) -> bool:
        expected = ownership(self._gateway, owned.epoch)
        return await self._store.update_if(self._key(owned), expected=expected, changes=change, ttl_s=ttl_s)

    def _record(self, owned: RequestProgress) -> dict[str, bytes]:
        facts = _facts(owned)
        created = self._wall_clock()
        record = first_record(gateway=self._gateway, epoch=owned.epoch, prompt=owned.request.prompt, facts=facts, created=created)
        return {**record, **attempt_change(owned.attempt, owned.worker, owned.decode_worker)}

    async def _append(self, owned: RequestProgress, choices: Iterable[int], *, ttl_s: float) -> None:
        entries = [
            encode_entry(self._entry(owned, choice))
            for choice in choices
            if owned.choices[choice].tokens or owned.choices[choice].ending
        ]
        if entries:
            await self._store.append({self._names.log_key(owned.request_id): entries}, ttl_s=ttl_s)

    def _entry(self, owned: RequestProgress, choice: int) -> LogEntry:
        new = owned.choices[choice].whole()
        return LogEntry(choice=choice, attempt=owned.attempt, writer=self._incarnation, new=new, epoch=owned.epoch)


def recorded_error(error: SegueError | None) -> RecordedError | None:
    match error:
        case None:
            return None
        case RequestError() | Unavailable() | RequestFailed():
            return RecordedError(message=str(error), code=error.code, status=error.status)
        case _:
            return RecordedError(message="an internal error", code="internal_error", status=500)


def _facts(owned: RequestProgress) -> RequestFacts:
    request = owned.request
    return RequestFacts(
        model=owned.model,
        sampling=request.sampling,
        choices=request.choices,
        body=request.body,
        salt=request.salt,
        tenant=request.tenant,
        lingers=owned.lingers,
        keep_prompt=request.keep_prompt,
        deadline_s=request.deadline_s,
        idempotency=request.idempotency,
        wanted=request.wanted,
    )
