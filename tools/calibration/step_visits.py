"""Measures a step of a shape, through the same engine and thread that a worker computes with, and by its clock.

The KV of earlier positions is whatever the pool holds: only its place and size matter for the time.
"""

import random

from common.ports.step_engine import StepEngine
from common.values.errors import SegueError
from common.values.step import SequenceStart, StepPlan, StepResult, StepRow
from tools.calibration.step_shapes import ROOM_TOKENS, ChunkShape, MixedShape, RowsShape, StepShape
from tools.probe_starts import probe_start

STEPS = 3
"""Measured decode steps of one visit; one before them is not counted."""


class StepVisitor:
    """`block_size` of the engine's pool, in which every shape that is visited has room."""

    def __init__(self, engine: StepEngine, *, vocab_size: int, block_size: int, seed: int = 4) -> None:
        self._engine = engine
        self._vocab_size = vocab_size
        self._block_size = block_size
        self._random = random.Random(seed)
        self._plans = 0
        self._handles = 0

    async def visit(self, shape: StepShape) -> list[float]:
        """Seconds of each measured step. Raises SegueError where one failed."""
        match shape:
            case ChunkShape():
                start = self._start(shape.positions)
                await self._execute(starts=(start,))
                took = await self._execute((self._chunk(start, shape, first_block=0),))
                await self._execute(ends=(start.handle,))
                return [took]
            case RowsShape():
                starts, times = await self._rows(shape, (), steps=STEPS)
                await self._execute(ends=tuple(start.handle for start in starts))
                return times
            case MixedShape():
                beside = self._start(shape.chunk.positions)
                await self._execute(starts=(beside,))
                chunk = self._chunk(beside, shape.chunk, first_block=shape.rows.rows * self._blocks(shape.rows.context + ROOM_TOKENS))
                starts, times = await self._rows(shape.rows, (chunk,), steps=1)
                await self._execute(ends=(beside.handle, *(start.handle for start in starts)))
                return times

    async def _rows(self, shape: RowsShape, beside: tuple[StepRow, ...], *, steps: int) -> tuple[list[SequenceStart], list[float]]:
        """`beside` goes into the last step. The rows of the middle step read `shape.context` tokens."""
        length = max(1, shape.context - (steps + 1) // 2)
        starts = [self._start(length) for _ in range(shape.rows)]
        await self._execute(starts=tuple(starts))
        blocks = self._blocks(length + steps + 1)
        tables = [tuple(row + shape.rows * place for place in range(blocks)) for row in range(shape.rows)]
        times = []
        for step in range(steps + 1):
            rows = tuple(
                StepRow(handle=start.handle, start=length + step - 1, count=1, blocks=table, sample=True)
                for start, table in zip(starts, tables, strict=True)
            )
            times.append(await self._execute(rows + (beside if step == steps else ())))
        return starts, times[1:]

    def _chunk(self, start: SequenceStart, shape: ChunkShape, *, first_block: int) -> StepRow:
        blocks = tuple(range(first_block, first_block + self._blocks(shape.positions)))
        return StepRow(handle=start.handle, start=shape.past, count=shape.tokens, blocks=blocks, sample=True)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block_size)

    def _start(self, length: int) -> SequenceStart:
        self._handles += 1
        return probe_start(self._handles, length, vocab_size=self._vocab_size, draws=self._random)

    async def _execute(
        self, rows: tuple[StepRow, ...] = (), starts: tuple[SequenceStart, ...] = (), ends: tuple[int, ...] = ()
    ) -> float:
        self._plans += 1
        plan = StepPlan(number=self._plans, rows=rows, starts=starts, ends=ends)
        result: StepResult = await self._engine.result(self._engine.submit(plan))
        faults = [row.fault for row in result.rows if row.fault is not None]
        if faults:
            raise SegueError(f"a step failed: {faults[0]}")
        return result.duration_s
