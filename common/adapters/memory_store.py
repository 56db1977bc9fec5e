"""The state store port within one process: for tests, and for a whole mesh on one event loop.

Time is an argument, so that a test lets a record expire by moving its clock. `set_available(False)` is a dead server.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from common.values.errors import InvariantBroken, StoreUnavailable


@dataclass(slots=True)
class _Record:
    expires_at: float
    fields: dict[str, bytes] = field(default_factory=dict)
    entries: list[bytes] = field(default_factory=list)


class MemoryStore:
    """One instance is shared by all who would use one server; closing it therefore changes nothing."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._records: dict[str, _Record] = {}
        self._available = True

    def set_available(self, available: bool) -> None:
        self._available = available

    async def create(self, key: str, fields: Mapping[str, bytes], *, ttl_s: float) -> bool:
        _check_fields(key, fields)
        if self._find(key) is not None:
            return False
        self._write(key, fields, ttl_s)
        return True

    async def put(self, key: str, fields: Mapping[str, bytes], *, ttl_s: float) -> None:
        _check_fields(key, fields)
        self._find(key)
        self._write(key, fields, ttl_s)

    async def update_if(self, key: str, *, expected: Mapping[str, bytes], changes: Mapping[str, bytes], ttl_s: float) -> bool:
        record = self._find(key)
        if record is None or any(record.fields.get(name) != value for name, value in expected.items()):
            return False
        self._write(key, changes, ttl_s)
        return True

    async def read(self, key: str) -> dict[str, bytes] | None:
        record = self._find(key)
        return None if record is None else dict(record.fields)

    async def refresh(self, key: str, *, ttl_s: float) -> bool:
        record = self._find(key)
        if record is None:
            return False
        record.expires_at = self._now() + ttl_s
        return True

    async def delete(self, key: str) -> None:
        if self._find(key) is not None:
            del self._records[key]

    async def keys(self, prefix: str) -> list[str]:
        return [key for key in list(self._records) if key.startswith(prefix) and self._find(key) is not None]

    async def append(self, lists: Mapping[str, Sequence[bytes]], *, ttl_s: float) -> dict[str, int]:
        for key, entries in lists.items():
            _check_entries(key, entries)
        lengths = {}
        for key, entries in lists.items():
            self._find(key)
            record = self._records.setdefault(key, _Record(expires_at=0.0))
            record.entries.extend(entries)
            record.expires_at = self._now() + ttl_s
            lengths[key] = len(record.entries)
        return lengths

    async def read_list(self, key: str) -> list[bytes]:
        record = self._find(key)
        return [] if record is None else list(record.entries)

    async def ping(self, *, timeout_s: float) -> bool:
        return self._available

    async def close(self) -> None:
        """Nothing to release; others may share this store."""

    def _find(self, key: str) -> _Record | None:
        """The live record; an expired one is removed first."""
        if not self._available:
            raise StoreUnavailable("the in-memory store was made unavailable")
        record = self._records.get(key)
        if record is not None and record.expires_at <= self._now():
            del self._records[key]
            return None
        return record

    def _write(self, key: str, fields: Mapping[str, bytes], ttl_s: float) -> None:
        record = self._records.setdefault(key, _Record(expires_at=0.0))
        record.fields.update(fields)
        record.expires_at = self._now() + ttl_s


def _check_fields(key: str, fields: Mapping[str, bytes]) -> None:
    if not fields:
        raise InvariantBroken(f"a record needs at least one field: {key}")


def _check_entries(key: str, entries: Sequence[bytes]) -> None:
    if not entries:
        raise InvariantBroken(f"a list grows by at least one entry: {key}")
