"""Small records with a time to live: what the mesh needs from Redis. Never scripting; Redis 6.2 suffices."""

from collections.abc import Mapping, Sequence
from typing import Protocol


class StateStore(Protocol):
    """A record is a hash of bytes under a key, a list holds bytes in order, and every key expires. All methods raise
    StoreUnavailable when the store does not answer within the adapter's time-out, is full, or refuses writes."""

    async def create(self, key: str, fields: Mapping[str, bytes], *, ttl_s: float) -> bool:
        """Make a record; False, changing nothing, where the key exists."""
        ...

    async def put(self, key: str, fields: Mapping[str, bytes], *, ttl_s: float) -> None:
        """Set these fields, others stay; make the record where it is missing; renew its time to live."""
        ...

    async def update_if(self, key: str, *, expected: Mapping[str, bytes], changes: Mapping[str, bytes], ttl_s: float) -> bool:
        """Compare-and-set: write `changes` only where every field of `expected` has that value now. False otherwise."""
        ...

    async def read(self, key: str) -> dict[str, bytes] | None: ...

    async def refresh(self, key: str, *, ttl_s: float) -> bool:
        """Renew the time to live; False where the key is gone."""
        ...

    async def delete(self, key: str) -> None: ...

    async def keys(self, prefix: str) -> list[str]:
        """Keys that start with `prefix`; without blocking the server (SCAN)."""
        ...

    async def append(self, lists: Mapping[str, Sequence[bytes]], *, ttl_s: float) -> dict[str, int]:
        """Add entries (at least one a list) at the end of several lists, each list's together and in order; make the lists
        that are missing; renew their time to live. Returns how long each list is now. Where this raises, any of the lists
        may have its entries."""
        ...

    async def read_list(self, key: str) -> list[bytes]:
        """All entries of a list, in order; none where there is no such key."""
        ...

    async def ping(self, *, timeout_s: float) -> bool: ...

    async def close(self) -> None: ...
