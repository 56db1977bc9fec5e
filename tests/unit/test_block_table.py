"""Block tables that kernels read: always what was given last, however it grew, shrank or changed."""

import ctypes

from hypothesis import given, settings
from hypothesis import strategies as st

from common.engine.block_table import BlockTable

POOL = 500


def numbers_at(table: BlockTable, count: int) -> tuple[int, ...]:
    return tuple((ctypes.c_int32 * count).from_address(table.address))


tables = st.lists(st.integers(0, POOL - 1), min_size=1, max_size=90).map(tuple)
growth = st.lists(st.integers(0, POOL - 1), min_size=0, max_size=5).map(tuple)


@settings(max_examples=200, deadline=None)
@given(steps=st.lists(st.tuples(st.none() | tables, growth), min_size=1, max_size=30))
def test_memory_holds_the_table_that_was_given_last(steps: list[tuple[tuple[int, ...] | None, tuple[int, ...]]]) -> None:
    table, current = BlockTable(), (7,)
    for other, added in steps:
        current = (current if other is None else other) + added
        assert table.replace(current, pool=POOL) is None
        assert numbers_at(table, len(current)) == current


def test_a_block_outside_the_pool_is_refused_and_changes_nothing() -> None:
    table = BlockTable((3, 4))
    for wrong in ((3, 4, POOL), (3, 4, -1), (POOL,)):
        assert "outside the pool" in (table.replace(wrong, pool=POOL) or "")
        assert numbers_at(table, 2) == (3, 4)
