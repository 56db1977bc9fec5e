"""Laws of the block pool under any order of allocation, sharing, naming and release."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.policy.block_pool import BlockPool
from common.values.errors import InvariantBroken

NAMES = st.integers(0, 7).map(lambda n: bytes([n]) * 16)


class PoolMachine(RuleBasedStateMachine):
    """The model: who holds what, and which name each block's content was given since its last allocation."""

    @initialize(blocks=st.integers(1, 8), caching=st.booleans())
    def build(self, blocks: int, caching: bool) -> None:
        self.caching = caching
        self.generations = [0] * blocks
        self.pool = BlockPool(blocks, self.generations, caching=caching)
        self.holders: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    def held(self) -> Counter[int]:
        return Counter(block for blocks in self.holders for block in blocks)

    @rule(count=st.integers(0, 9))
    def allocate(self, count: int) -> None:
        before = list(self.generations)
        held = self.held()
        assert self.pool.can_allocate(count) == (count <= len(before) - len(held))
        if not self.pool.can_allocate(count):
            with pytest.raises(InvariantBroken):
                self.pool.allocate(count)
            assert self.generations == before
            return
        cached = self.pool.cached
        free = self.pool.free
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert not set(blocks) & set(held), "a held block was given away"
        assert self.pool.cached == cached - max(0, count - free), "cached blocks went while there were free ones"
        for block, generation in enumerate(self.generations):
            assert generation == before[block] + (block in blocks)
            assert self.pool.generation(block) == generation
        for block in blocks:
            self.content.pop(block, None)
        if blocks:
            self.holders.append(blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def name_a_held_block(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.held())))
        name = data.draw(NAMES)
        known = self.pool.match([name])
        self.pool.name(block, name)
        if self.caching and not known and block not in self.content:
            self.content[block] = name
            assert self.pool.match([name]) == [block]
        else:
            assert self.pool.match([name]) == known, "the first block of a name stays the one that is found"

    @rule(names=st.lists(NAMES, max_size=5))
    def match_and_share(self, names: list[bytes]) -> None:
        generations = list(self.generations)
        blocks = self.pool.match(names)
        assert [self.content[block] for block in blocks] == names[: len(blocks)], "a match has another content"
        unheld = [block for block in set(blocks) if block not in self.held()]
        room = len(self.generations) - len(self.held()) - len(unheld)
        assert self.pool.evictable_outside(list(dict.fromkeys(blocks))) == room
        if len(blocks) < len(names):
            assert names[len(blocks)] not in self.content.values()
        self.pool.share(blocks)
        assert self.generations == generations, "sharing raises no generation"
        if blocks:
            self.holders.append(blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        block = data.draw(st.integers(0, len(self.generations) - 1))
        name = self.content.pop(block, None)
        self.pool.forget(block)
        assert name is None or self.pool.match([name]) == []

    @precondition(lambda self: self.pool.free)
    @rule(data=st.data())
    def a_free_block_has_no_holder(self, data: st.DataObject) -> None:
        free = [b for b in range(len(self.generations)) if b not in self.held() and b not in self.content]
        assert len(free) == self.pool.free
        block = data.draw(st.sampled_from(free))
        with pytest.raises(InvariantBroken):
            self.pool.share([block])
        with pytest.raises(InvariantBroken):
            self.pool.release([block])
        with pytest.raises(InvariantBroken):
            self.pool.name(block, b"x" * 16)

    @invariant()
    def conserved(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_invariants()
        held = self.held()
        assert self.pool.held == len(held)
        assert self.pool.free + self.pool.cached + self.pool.held == self.pool.total == len(self.generations)
        assert self.pool.cached == len([block for block in self.content if block not in held])

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for blocks in self.holders:
                self.pool.release(blocks)
            assert self.pool.held == 0


PoolMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestBlockPool = PoolMachine.TestCase


def test_the_deepest_block_of_the_longest_unused_prefix_is_evicted_first() -> None:
    pool = BlockPool(4, [0] * 4)
    older, newer = pool.allocate(2), pool.allocate(2)
    for block in older + newer:
        pool.name(block, bytes([block]) * 16)
    pool.release(older)
    pool.release(newer)
    assert [pool.allocate(1)[0] for _ in range(4)] == [older[1], older[0], newer[1], newer[0]]
