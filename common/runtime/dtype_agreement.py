"""One dtype for all workers of a model: KV moves only between equal ones, and `--dtype auto` may measure differently on each host.

The first worker of a (served name, revision) fixes it in the store, by making a record that nobody overwrites; later ones take
what stands there. The record expires unless a living worker that computes in this dtype renews it, and such a worker makes it
again where a restarted store has lost it. A worker that was told another dtype keeps its own, says so, and can pair with nobody
of the others: that shows where every other difference of fingerprints shows.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, cast, get_args

from common.ports.state_store import StateStore
from common.values.errors import ModelError, StoreUnavailable
from common.values.kv_layout import KvDtype

DTYPE_TTL_S: Final = 60.0
DTYPE_RENEWAL_S: Final = 5.0
DTYPE_FIELD: Final = "dtype"
_ATTEMPTS: Final = 3
"""A record can expire between two looks at it, but not again and again."""
logger = logging.getLogger(__name__)


class DtypeAgreement:
    """The record of one model, under `key`."""

    def __init__(self, store: StateStore, key: str) -> None:
        self._store = store
        self._key = key
        self._warned: KvDtype | None = None

    async def fixed(self) -> KvDtype | None:
        """What the mesh computes in; None where nobody has fixed it."""
        record = await self._store.read(self._key)
        return None if record is None or DTYPE_FIELD not in record else _known(record[DTYPE_FIELD])

    async def settle(self, measure: Callable[[], Awaitable[KvDtype]]) -> KvDtype:
        """For `auto`: the mesh's dtype, which is what `measure` says where we are the first."""
        fixed = await self.fixed()
        return fixed if fixed is not None else await self.hold(await measure())

    async def hold(self, dtype: KvDtype) -> KvDtype:
        """Fix `dtype` where nothing is fixed, and renew it where it stands. Returns what is fixed now."""
        value = {DTYPE_FIELD: dtype.encode()}
        for _ in range(_ATTEMPTS):
            if await self._store.update_if(self._key, expected=value, changes=value, ttl_s=DTYPE_TTL_S):
                return dtype
            if await self._store.create(self._key, value, ttl_s=DTYPE_TTL_S):
                return dtype
            if (fixed := await self.fixed()) is not None:
                return fixed
        raise StoreUnavailable(f"{self._key} comes and goes")

    async def keep(self, dtype: KvDtype) -> None:
        """Hold it for as long as the worker lives."""
        while True:
            try:
                self.compare(dtype, await self.hold(dtype))
            except StoreUnavailable as error:
                logger.warning("dtype_not_renewed", extra={"fields": {"reason": str(error)}})
            await asyncio.sleep(DTYPE_RENEWAL_S)

    def compare(self, ours: KvDtype, fixed: KvDtype) -> None:
        """Say it once where the mesh computes in another dtype than we do."""
        if fixed != ours and fixed != self._warned:
            logger.warning("dtype_differs", extra={"fields": {"ours": ours, "mesh": fixed}})
        self._warned = None if fixed == ours else fixed


def _known(value: bytes) -> KvDtype:
    text = value.decode("utf-8", errors="replace")
    if text not in get_args(KvDtype):
        raise ModelError(f"the mesh computes this model in {text!r}, which this version does not know: give --dtype")
    return cast("KvDtype", text)
