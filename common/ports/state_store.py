"""Small records with a time to live: what the mesh needs from Redis. Never scripting; Redis 6.2 suffices."""

from collections.abc import Mapping
from typing import Protocol


class StateStore(Protocol):
    """A record is a hash of bytes under a key, and every key expires. All methods raise StoreUnavailable when the store
    does not answer within the adapter's time-out, is full, or refuses writes."""

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

    async def ping(self, *, timeout_s: float) -> bool: ...

    async def close(self) -> None: ...
