"""What the mesh has not been told yet about a worker's prefix cache: the difference between what was told and what is there.

A difference rather than a history: a block that comes and goes between two pages is never told, and what is kept is at most
two names a block. Removals leave before additions, so that a listener never holds more names than the pool has blocks.
"""

from collections.abc import Collection

from common.policy.block_hash import BlockHash
from common.values.cache_page import CachePage


class PrefixLog:
    """`known` are the names in the pool now, seen live; the pool reports each change right after it."""

    def __init__(self, known: Collection[BlockHash]) -> None:
        self._known = known
        self._to_add: dict[BlockHash, None] = {}
        self._to_remove: dict[BlockHash, None] = {}
        self._restart = False
        self._telling_whole = False
        self._number = 0

    def added(self, name: BlockHash) -> None:
        if name in self._to_remove:
            del self._to_remove[name]
        else:
            self._to_add[name] = None

    def removed(self, name: BlockHash) -> None:
        if name in self._to_add:
            del self._to_add[name]
        else:
            self._to_remove[name] = None

    def restart(self) -> None:
        """Somebody missed a page: tell the whole set from the beginning. One telling at a time: who missed its beginning
        notices that and asks again."""
        if self._telling_whole:
            return
        self._restart = self._telling_whole = True
        self._to_add = dict.fromkeys(self._known)
        self._to_remove = {}

    @property
    def names(self) -> frozenset[BlockHash]:
        """What a listener knows once it has all pages."""
        return frozenset(self._known)

    @property
    def pending(self) -> bool:
        """Whether the next page has news."""
        return self._restart or bool(self._to_add) or bool(self._to_remove)

    def take(self, limit: int) -> CachePage:
        """The next page, with at most `limit` names. It counts as told, whether it arrives or not."""
        removed = _take_first(self._to_remove, limit)
        added = _take_first(self._to_add, limit - len(removed))
        restart, self._restart = self._restart, False
        self._number += restart or bool(removed) or bool(added)
        self._telling_whole = self._telling_whole and self.pending
        return CachePage(number=self._number, restart=restart, added=b"".join(added), removed=b"".join(removed))


def _take_first(names: dict[BlockHash, None], limit: int) -> list[BlockHash]:
    taken = [name for name, _ in zip(names, range(limit), strict=False)]
    for name in taken:
        del names[name]
    return taken
