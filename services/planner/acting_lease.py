"""Which of several planners acts: the one that holds a record in the store, made by whoever comes first and renewed by it alone."""

import logging

from common.ports.state_store import StateStore
from common.values.errors import StoreUnavailable

LEASE_S = 5.0
PLANNER_FIELD = "planner"
logger = logging.getLogger(__name__)


class ActingLease:
    """While the store is away nobody acts: two that act would undo each other's changes."""

    def __init__(self, store: StateStore, key: str, planner: str) -> None:
        self._store = store
        self._key = key
        self._ours = {PLANNER_FIELD: planner.encode()}
        self._away = False

    async def hold(self) -> bool:
        """Renew it, or take it where nobody has it. Called more often than it expires."""
        try:
            renewed = await self._store.update_if(self._key, expected=self._ours, changes=self._ours, ttl_s=LEASE_S)
            held = renewed or await self._store.create(self._key, self._ours, ttl_s=LEASE_S)
        except StoreUnavailable as error:
            if not self._away:
                logger.warning("lease_unknown", extra={"fields": {"reason": str(error)}})
            self._away = True
            return False
        self._away = False
        return held

    async def release(self) -> None:
        """So that another one acts at once."""
        try:
            if await self._store.update_if(self._key, expected=self._ours, changes=self._ours, ttl_s=LEASE_S):
                await self._store.delete(self._key)
        except StoreUnavailable as error:
            logger.warning("lease_left", extra={"fields": {"reason": str(error)}})
