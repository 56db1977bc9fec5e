"""What `bench-engine` measures: anything that can prefill a prompt and decode a batch, our own engine first of all.

Each visit is short, so that visits of all subjects can take turns and a machine that drifts drifts for all of them.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from common.engine.machine_peaks import Clock
from common.values.errors import SegueError
from common.values.step import SequenceStart, StepPlan, StepResult, StepRow
from tools.engine_variants import LoadedVariant
from tools.probe_starts import probe_start

OWN = "segue"
"""How the names of our own subjects begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillCase:
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCase:
    """`context` is the mean number of positions that a row of the measured steps sees, itself included."""

    batch: int
    context: int


Case = PrefillCase | DecodeCase


class Subject(Protocol):
    """`weights` is the dtype of its weights, `kv_item_bytes` the size of an element of its KV cache. `visits` bounds how
    often a subject is visited whose visits are dear."""

    name: str
    weights: str
    kv_item_bytes: int
    visits: int | None

    def prefill_s(self, case: PrefillCase) -> list[float]:
        """Seconds of each prefill of a prompt, to its first token."""
        ...

    def decode_s(self, case: DecodeCase, *, steps: int) -> list[float]:
        """Seconds of each of `steps` consecutive steps, none of them the first after a pause."""
        ...

    def close(self) -> None: ...


class EngineSubject:
    """Our own executor, given the plans that a worker would give it; a token is drawn at the end of each row."""

    def __init__(self, loaded: LoadedVariant, *, vocab_size: int, clock: Clock, chunk: int | None = None) -> None:
        self.name = f"{OWN}, {loaded.variant.forward}"
        self.weights: str = loaded.variant.weights
        self.kv_item_bytes = loaded.pool.layout.item_bytes
        self.visits: int | None = None
        self._executor = loaded.executor
        self._pool = loaded.pool
        self._vocab_size = vocab_size
        self._clock = clock
        self._chunk = chunk
        self._random = random.Random(4)
        self._plans = 0
        self._handles = 0

    def prefill_s(self, case: PrefillCase) -> list[float]:
        start = self._start(case.tokens)
        blocks = tuple(range(self._pool.layout.blocks_for(case.tokens)))
        size = self._chunk or case.tokens
        took = 0.0
        for first in range(0, case.tokens, size):
            count = min(size, case.tokens - first)
            row = StepRow(handle=start.handle, start=first, count=count, blocks=blocks, sample=first + count == case.tokens)
            took += self._timed((row,), (start,) if first == 0 else ())
        self._execute(ends=(start.handle,))
        return [took]

    def decode_s(self, case: DecodeCase, *, steps: int) -> list[float]:
        """The KV of the earlier positions is whatever the pool holds: only its place and size matter for the time."""
        length = first_length(case, steps=steps)
        starts = tuple(self._start(length) for _ in range(case.batch))
        each = self._pool.layout.blocks_for(length + steps + 1)
        tables = [tuple(row + case.batch * place for place in range(each)) for row in range(case.batch)]
        self._execute(starts=starts)
        times = []
        for step in range(steps + 1):
            rows = tuple(
                StepRow(handle=start.handle, start=length + step - 1, count=1, blocks=table, sample=True)
                for start, table in zip(starts, tables, strict=True)
            )
            times.append(self._timed(rows))
        self._execute(ends=tuple(start.handle for start in starts))
        return times[1:]

    def close(self) -> None:
        """Nothing is held beyond memory."""

    def _start(self, length: int) -> SequenceStart:
        self._handles += 1
        return probe_start(self._handles, length, vocab_size=self._vocab_size, draws=self._random)

    def _timed(self, rows: tuple[StepRow, ...], starts: tuple[SequenceStart, ...] = ()) -> float:
        began = self._clock()
        result = self._execute(rows, starts)
        took = self._clock() - began
        faults = [row.fault for row in result.rows if row.fault is not None]
        if faults:
            raise SegueError(f"{self.name} failed: {faults[0]}")
        return took

    def _execute(
        self, rows: tuple[StepRow, ...] = (), starts: tuple[SequenceStart, ...] = (), ends: tuple[int, ...] = ()
    ) -> StepResult:
        self._plans += 1
        return self._executor.execute(StepPlan(number=self._plans, rows=rows, starts=starts, ends=ends))


def first_length(case: DecodeCase, *, steps: int) -> int:
    """Of a sequence before one unmeasured and `steps` measured steps that see `case.context` positions in the mean."""
    return max(1, case.context - (steps + 1) // 2)


def blocks_needed(cases: Sequence[Case], *, steps: int, block_size: int) -> int:
    """Of the pool in which every case can be measured."""
    return max(
        -(-case.tokens // block_size)
        if isinstance(case, PrefillCase)
        else case.batch * -(-(first_length(case, steps=steps) + steps + 1) // block_size)
        for case in cases
    )
