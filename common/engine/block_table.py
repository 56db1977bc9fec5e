"""A sequence's block table as the kernels read it: int32 numbers at one address, kept from step to step.

A table grows by a block every few steps. What is known already is compared with, which is quick, and neither checked nor converted
again: in a long context that would cost more than the rest of a step's preparation.
"""

import numpy as np

_FIRST_SIZE = 32


class BlockTable:
    def __init__(self, blocks: tuple[int, ...] = ()) -> None:
        self._blocks: tuple[int, ...] = ()
        self._numbers = np.zeros(_FIRST_SIZE, dtype=np.int32)
        self.address: int = self._numbers.ctypes.data
        """Good until the table is replaced by a longer one."""
        self._take(blocks, 0)

    def replace(self, blocks: tuple[int, ...], *, pool: int) -> str | None:
        """Make it this table of blocks of a pool of `pool`; or say why that cannot be, and leave it as it was."""
        if blocks is self._blocks:
            return None
        known = len(self._blocks)
        if blocks[:known] != self._blocks:
            known = 0
        added = blocks[known:]
        if added and (min(added) < 0 or max(added) >= pool):
            return f"the block table names a block outside the pool of {pool}"
        self._take(blocks, known)
        return None

    def _take(self, blocks: tuple[int, ...], known: int) -> None:
        if len(blocks) > len(self._numbers):
            longer = np.zeros(2 * len(blocks), dtype=np.int32)
            longer[:known] = self._numbers[:known]
            self._numbers = longer
            self.address = longer.ctypes.data
        self._numbers[known : len(blocks)] = blocks[known:]
        self._blocks = blocks
