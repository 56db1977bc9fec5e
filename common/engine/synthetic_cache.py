"""What the synthetic engine writes into a KV region in place of keys and values, and how it recognises it again.

The pattern of a position is a hash of all tokens up to it, as real keys and values are a function of the whole prefix. So a
block that went astray in a hand-off, was overwritten by a neighbour, or belongs to another prefix, is noticed.
"""

import ctypes

import numpy as np
from numpy.typing import NDArray

from common.values.errors import SettingsError
from common.values.kv_layout import KvLayout

Words = NDArray[np.uint64]


class SyntheticCache:
    """A region as 64-bit words: the first word of every layer, K or V, head and position carries the pattern."""

    def __init__(self, *, layout: KvLayout, address: int, blocks: int) -> None:
        row_bytes = layout.head_dim * layout.item_bytes
        if row_bytes % 8:
            raise SettingsError(f"the synthetic engine needs head_dim x item size to be a multiple of 8 bytes, not {row_bytes}")
        memory = (ctypes.c_uint8 * (blocks * layout.block_bytes)).from_address(address)
        shape = (blocks, layout.layers * 2 * layout.kv_heads, layout.block_size, row_bytes // 8)
        self._words = np.frombuffer(memoryview(memory), dtype=np.uint64).reshape(shape)[..., 0]
        self.blocks = blocks
        self.block_size = layout.block_size

    def write(self, table: tuple[int, ...], start: int, patterns: Words) -> None:
        """Put the patterns of positions `start ..` where the table says."""
        blocks, offsets = self._places(table, start, start + len(patterns))
        self._words[blocks, :, offsets] = patterns[:, None]

    def mismatch(self, table: tuple[int, ...], patterns: Words, *, thorough: bool) -> int | None:
        """The first of the positions `0 .. len(patterns) - 1` whose pattern is wrong. Looks at every layer and head where
        `thorough`, else at the first and the last alone."""
        if not len(patterns):
            return None
        blocks, offsets = self._places(table, 0, len(patterns))
        lanes = slice(None) if thorough else slice(None, None, max(1, self._words.shape[1] - 1))
        wrong = (self._words[:, lanes][blocks, :, offsets] != patterns[:, None]).any(axis=1)
        return int(wrong.argmax()) if wrong.any() else None

    def _places(self, table: tuple[int, ...], start: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        positions = np.arange(start, end)
        return np.asarray(table, dtype=np.int64)[positions // self.block_size], positions % self.block_size


def position_patterns(tokens: list[int]) -> Words:
    """One word per position, each a hash of the tokens up to and including it."""
    positions = np.arange(len(tokens), dtype=np.uint64)
    salted = (np.asarray(tokens, dtype=np.uint64) + np.uint64(1)) * (_mix(positions) | np.uint64(1))
    return _mix(np.cumsum(salted, dtype=np.uint64))


def _mix(values: Words) -> Words:
    """splitmix64's finaliser, elementwise, modulo 2**64."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
