"""Who owns which KV block: allocation, sharing, and the cache of full blocks that nobody uses right now.

A block is in exactly one of three states: held (reference count above zero), cached (count zero, content known by its
hash, evictable), free. Allocation takes free blocks first, then evicts the least recently used cached ones. A block's
generation rises before its new owner may write, so that a peer that still reads the old content notices.
"""

from collections import OrderedDict
from collections.abc import Iterable, MutableSequence, Sequence

from common.policy.block_hash import BlockHash
from common.policy.prefix_log import PrefixLog
from common.values.errors import InvariantBroken


class BlockPool:
    """`generations` has one entry a block and may live in shared memory; only `allocate` writes to it."""

    def __init__(self, blocks: int, generations: MutableSequence[int] | memoryview, *, caching: bool = True) -> None:
        if blocks < 1:
            raise ValueError("a pool has at least one block")
        self._total = blocks
        self._generations = generations
        self._caching = caching
        self._references = [0] * blocks
        self._free = list(range(blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._hash_of: dict[int, BlockHash] = {}
        self._block_of: dict[BlockHash, int] = {}
        self._prefix_log = PrefixLog(self._block_of.keys())

    @property
    def prefix_log(self) -> PrefixLog:
        """What others may be told of the names in this pool."""
        return self._prefix_log

    @property
    def total(self) -> int:
        return self._total

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def held(self) -> int:
        return self._total - len(self._free) - len(self._cached)

    def can_allocate(self, count: int) -> bool:
        return count <= len(self._free) + len(self._cached)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with reference count one and a new generation. Check `can_allocate` first."""
        if not self.can_allocate(count):
            raise InvariantBroken(f"allocate({count}) with {self.free} free and {self.cached} cached blocks")
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._generations[block] += 1
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def generation(self, block: int) -> int:
        return int(self._generations[block])

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for blocks that are held or cached."""
        for block in blocks:
            if self._references[block] == 0:
                if block not in self._cached:
                    raise InvariantBroken(f"share of free block {block}")
                del self._cached[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder fewer. Deeper blocks become evictable first: a prefix is of use without them, they are not without it."""
        for block in reversed(blocks):
            if self._references[block] < 1:
                raise InvariantBroken(f"release of block {block}, which nobody holds")
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._hash_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def name(self, block: int, block_hash: BlockHash) -> None:
        """The block is full and its content is `block_hash`: others may share it from now on.

        The first block of that name stays the one that is found; a twin is freed when its holders are done.
        """
        if self._references[block] < 1:
            raise InvariantBroken(f"name for block {block}, which nobody holds")
        if self._caching and block_hash not in self._block_of and block not in self._hash_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash
            self._prefix_log.added(block_hash)

    def forget(self, block: int) -> None:
        """The content is not what its name says: nobody finds it any more; it is free once its holders are done."""
        block_hash = self._hash_of.pop(block, None)
        if block_hash is not None:
            del self._block_of[block_hash]
            self._prefix_log.removed(block_hash)
        if block in self._cached:
            del self._cached[block]
            self._free.append(block)

    def match(self, hashes: Sequence[BlockHash]) -> list[int]:
        """The blocks of the longest known prefix, not yet held: `share` them before anything else is allocated."""
        blocks = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def evictable_outside(self, blocks: Sequence[int]) -> int:
        """How many blocks could be allocated once `blocks` are held."""
        return self.free + self.cached - sum(1 for block in blocks if self._references[block] == 0)

    def check_invariants(self) -> None:
        """Every block is in one state; the index is a bijection; cached blocks have names."""
        held = {block for block, count in enumerate(self._references) if count > 0}
        free, cached = set(self._free), set(self._cached)
        whole = len(free) == len(self._free) and len(held) + len(free) + len(cached) == self._total
        if not whole or held & free or held & cached or free & cached:
            raise InvariantBroken("a block is in no state, or in two")
        if {h: b for b, h in self._hash_of.items()} != self._block_of:
            raise InvariantBroken("the prefix index is not a bijection")
        if not cached <= set(self._hash_of) or free & set(self._hash_of):
            raise InvariantBroken("a cached block without a name, or a free one with one")

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        block_hash = self._hash_of.pop(block)
        del self._block_of[block_hash]
        self._prefix_log.removed(block_hash)
        return block
