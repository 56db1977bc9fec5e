"""An engine without a model: steps take the time that a formula says, tokens are a hash of the prompt.

It keeps every rule of the step contract, sequences and faults included, so the whole mesh can run and be tested without torch. Given
a KV region it also checks that each sequence's cache is its own before it goes on from it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from common.engine.sequence_state import SequenceState, SequenceTable, scored_positions, table_fault
from common.engine.synthetic_cache import SyntheticCache, position_patterns
from common.engine.synthetic_tokens import prompt_digest, synthetic_logprobs, synthetic_token
from common.ports.kv_transport import KvRegion
from common.values.step import RowResult, StepPlan, StepResult, StepRow
from common.values.tokens import PositionLogprobs

EndAt = Callable[[int, int], bool]
"""(prompt digest, index of the new token) → whether that token is the end of the sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Seconds of a step: `fixed + per_prefill_token * tokens of chunks + per_decode_row * rows of one position`."""

    fixed: float = 0.0
    per_prefill_token: float = 0.0
    per_decode_row: float = 0.0

    def seconds(self, plan: StepPlan) -> float:
        if not plan.rows:
            return 0.0
        decode = sum(1 for row in plan.rows if row.count == 1)
        return self.fixed + self.per_prefill_token * (plan.tokens - decode) + self.per_decode_row * decode


class SyntheticExecutor:
    """An Executor. It never makes an end-of-sequence token, except where `ends_at` says so; sampling parameters other than
    min_tokens and logprobs change nothing. Without a region any block table passes."""

    def __init__(
        self, *, vocab_size: int, region: KvRegion | None = None, times: StepTimes | None = None, ends_at: EndAt | None = None
    ) -> None:
        self._vocab_size = vocab_size
        self._times = times or StepTimes()
        self._ends_at = ends_at
        self._sequences = SequenceTable(vocab_size=vocab_size)
        self._digests: dict[int, int] = {}
        self._seen: set[int] = set()
        self._region = region  # kept: the cache looks at its memory
        self._cache: SyntheticCache | None = None
        if region is not None:
            self._cache = SyntheticCache(layout=region.layout, address=region.blocks_address, blocks=region.blocks)

    def prepare_thread(self, threads: int) -> None:
        """Nothing here computes in threads."""

    def execute(self, plan: StepPlan) -> StepResult:
        began = time.perf_counter()
        for handle in plan.ends:
            self._seen.discard(handle)
            self._digests.pop(handle, None)
        self._sequences.apply(plan.ends, plan.starts)
        for start in plan.starts:
            self._digests[start.handle] = prompt_digest(start.tokens[: start.prompt_length])
        rows = tuple(self._row(row) for row in plan.rows)
        left = began + self._times.seconds(plan) - time.perf_counter()
        if left > 0:
            time.sleep(left)
        return StepResult(number=plan.number, rows=rows, duration_s=time.perf_counter() - began)

    def _row(self, row: StepRow) -> RowResult:
        state = self._sequences.get(row.handle)
        fault = self._check(row)
        if fault is not None or state is None:
            if state is not None:
                state.failed = fault
            return RowResult(handle=row.handle, fault=fault)
        end = row.start + row.count
        if self._cache is not None:
            self._cache.write(row.blocks, row.start, position_patterns(state.tokens[:end])[row.start :])
            self._seen.add(row.handle)
        scores: tuple[PositionLogprobs, ...] = ()
        if row.prompt_logprobs:
            scored = state.tokens[row.start + 1 : row.start + 1 + scored_positions(row, state)]
            scores = tuple(self._logprobs(token, state.sampling.prompt_logprobs or 0) for token in scored)
        if not row.sample:
            return RowResult(handle=row.handle, prompt_logprobs=scores)
        token = self._next_token(state)
        if token is None:
            state.failed = "no token is left to draw: all are masked"
            return RowResult(handle=row.handle, fault=state.failed)
        state.append(token)
        alternatives = state.sampling.logprobs
        logprobs = None if alternatives is None else self._logprobs(token, alternatives)
        return RowResult(handle=row.handle, token=token, logprobs=logprobs, prompt_logprobs=scores)

    def _logprobs(self, token: int, alternatives: int) -> PositionLogprobs:
        return synthetic_logprobs(token, alternatives=alternatives, vocab_size=self._vocab_size)

    def _check(self, row: StepRow) -> str | None:
        state = self._sequences.get(row.handle)
        fault = self._sequences.row_fault(row)
        if fault is not None or state is None or self._cache is None:
            return fault
        fault = table_fault(row, state.table, blocks=self._cache.blocks, block_size=self._cache.block_size)
        if fault is not None:
            return fault
        patterns = position_patterns(state.tokens[: row.start])
        wrong = self._cache.mismatch(row.blocks, patterns, thorough=row.handle not in self._seen)
        return None if wrong is None else f"kv_mismatch: the cache of position {wrong} is not this sequence's"

    def _next_token(self, state: SequenceState) -> int | None:
        digest, index = self._digests[state.handle], state.new_tokens
        masked = state.masked_tokens
        if state.eos_token_ids and not masked and self._ends_at is not None and self._ends_at(digest, index):
            return state.eos_token_ids[0]
        return synthetic_token(digest, index, vocab_size=self._vocab_size, avoid=state.eos_token_ids + masked)
