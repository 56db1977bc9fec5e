"""Which prefixes the workers hold, as their snapshots tell: the router's side of `prefix_log`.

A view is exact or empty: after a lost page nothing is believed of that worker until it has told its whole set again. It is a
hint all the same (a block may be evicted while a request is under way), so being wrong costs time and never an answer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from common.policy.block_hash import BlockHash, extend_hashes, root_hash
from common.values.cache_page import NAME_BYTES, CachePage
from common.values.ids import Incarnation, WorkerId
from common.values.kv_layout import Fingerprint

ASK_AGAIN_S = 1.0
MAX_NAMES = 1 << 18
"""Of one worker; of a larger cache a part is known."""
MAX_COMPARED_BLOCKS = 4096
"""Of one prompt: hashing runs on the gateway's event loop (about a microsecond a block)."""


@dataclass(slots=True)
class _Told:
    """What one incarnation of a worker has told. `number` is None from a lost page until the whole set begins."""

    incarnation: Incarnation
    number: int | None = 0
    names: set[BlockHash] = field(default_factory=set)
    asked_at: float = -math.inf


class PrefixView:
    def __init__(self) -> None:
        self._told: dict[WorkerId, _Told] = {}

    def observe(self, worker: WorkerId, incarnation: Incarnation, page: CachePage, now: float) -> bool:
        """Apply a page; older ones are ignored. True: a page is missing, ask the worker for its whole set."""
        told = self._told.get(worker)
        if told is None or told.incarnation != incarnation:
            told = self._told[worker] = _Told(incarnation)
        if page.restart and (told.number is None or page.number > told.number):
            told.names.clear()
            _apply(told, page)
        elif told.number is not None and page.follows > told.number:
            told.number = None
            told.names.clear()
        elif page.is_news and page.follows == told.number:
            _apply(told, page)
        if told.number is not None or now - told.asked_at < ASK_AGAIN_S:
            return False
        told.asked_at = now
        return True

    def forget(self, worker: WorkerId) -> None:
        self._told.pop(worker, None)

    def names(self, worker: WorkerId) -> frozenset[BlockHash]:
        told = self._told.get(worker)
        return frozenset() if told is None else frozenset(told.names)

    def overlaps(self, workers: Mapping[WorkerId, Fingerprint], tokens: Sequence[int], salt: bytes) -> dict[WorkerId, int]:
        """How many of the first `tokens` each worker need not compute: full blocks that it holds, without the last token,
        which is always computed. Workers that hold nothing are left out."""
        overlaps: dict[WorkerId, int] = {}
        chains: dict[BlockHash, list[BlockHash]] = {}
        for worker, fingerprint in workers.items():
            told = self._told.get(worker)
            if told is None or not told.names:
                continue
            root, size = root_hash(fingerprint, salt), fingerprint.layout.block_size
            chain = chains.setdefault(root, [])
            matched = _matched(told.names, chain, root, tokens, size)
            if matched:
                overlaps[worker] = matched * size
        return overlaps


def _apply(told: _Told, page: CachePage) -> None:
    told.number = page.number
    told.names.difference_update(_split(page.removed))
    told.names.update(_split(page.added)[: max(0, MAX_NAMES - len(told.names))])


def _split(names: bytes) -> list[BlockHash]:
    return [names[start : start + NAME_BYTES] for start in range(0, len(names), NAME_BYTES)]


def _matched(names: set[BlockHash], chain: list[BlockHash], root: BlockHash, tokens: Sequence[int], size: int) -> int:
    """`chain` grows only as far as some worker's prefix goes."""
    most = min((len(tokens) - 1) // size, MAX_COMPARED_BLOCKS)
    for index in range(most):
        extend_hashes(chain, root, tokens, size, index + 1)
        if chain[index] not in names:
            return index
    return max(0, most)
