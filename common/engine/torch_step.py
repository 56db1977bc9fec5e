"""Steps computed by a model's forward (transformers' modules, or native kernels) and our sampler.

The rows of a plan go through the model in one forward. Where that raises, they are run one at a time, so that the row that
breaks it fails alone. Rows that ask for prompt log-probabilities run by themselves, in slices, because the logits of every
position of a long prompt would not fit into memory at once.
"""

import logging
import time
from collections.abc import Mapping, Sequence, Set

import torch

from common.engine.executor import Executor
from common.engine.forward import ModelForward
from common.engine.kv_cache_view import KvCacheView
from common.engine.native.choose_forward import choose_forward
from common.engine.native.library import NativeLibrary
from common.engine.native.native_sampler import choose_sampler
from common.engine.paged_batch import BatchRow
from common.engine.quantization_choice import Quantization
from common.engine.quantized_file import StoredMatrix
from common.engine.sampler import NOT_FINITE, Drawn
from common.engine.sequence_state import SequenceState, SequenceTable, scored_positions, table_fault
from common.ports.grammar_mask import GrammarMasks
from common.values.kv_layout import KvLayout
from common.values.step import RowResult, StepPlan, StepResult, StepRow
from common.values.tokens import PositionLogprobs

SLICE_POSITIONS = 256
SLICE_LOGITS = 2**24
"""A slice of prompt log-probabilities holds at most this many logits (64 MiB), and at most SLICE_POSITIONS positions."""

logger = logging.getLogger(__name__)


def build_torch_executor(
    model: torch.nn.Module,
    layout: KvLayout,
    blocks_address: int,
    blocks: int,
    device: str,
    *,
    check: bool = True,
    max_model_len: int | None = None,
    library: NativeLibrary | None = None,
    quantization: Quantization = "none",
    stored: Mapping[str, StoredMatrix] | None = None,
    masks: GrammarMasks | None = None,
) -> Executor:
    """An executor for a loaded causal language model over a region of `blocks` blocks at `blocks_address`.

    With `check`, first makes sure that this architecture computes the same through paged attention as by itself, and
    raises ModelError where it does not. `max_model_len` is the longest sequence that will be asked for. With a `library`, a
    model of the Llama family is taken over by native kernels: `model` has no weights afterwards. `stored` are the matrices that
    its folder keeps quantised. `masks` say which tokens a sequence's grammar allows.
    """
    forward = choose_forward(
        model,
        layout,
        device=device,
        check=check,
        max_model_len=max_model_len,
        library=library,
        quantization=quantization,
        stored=stored,
    )
    cache = KvCacheView.over_region(layout=layout, address=blocks_address, blocks=blocks, device=device)
    return TorchExecutor(forward, cache, library=library, masks=masks)


class TorchExecutor:
    """An Executor over any ModelForward."""

    def __init__(
        self, forward: ModelForward, cache: KvCacheView, *, library: NativeLibrary | None = None, masks: GrammarMasks | None = None
    ) -> None:
        self._forward = forward
        self._cache = cache
        self._sampler = choose_sampler(library, str(cache.data.device))
        self._sequences = SequenceTable(vocab_size=forward.vocab_size, masks=masks)

    def prepare_thread(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._forward.prepare_thread(threads)
        self._sampler.prepare_thread(threads)

    def execute(self, plan: StepPlan) -> StepResult:
        began = time.perf_counter()
        self._sequences.apply(plan.ends, plan.starts)
        results: dict[int, RowResult] = {}
        together: list[int] = []
        seen: set[int] = set()
        with torch.inference_mode():
            for i, row in enumerate(plan.rows):
                fault = self._row_fault(row, seen)
                seen.add(row.handle)
                if fault is not None:
                    results[i] = self._failed(row, fault)
                elif row.prompt_logprobs:
                    results[i] = self._run_alone(row)
                else:
                    together.append(i)
            rows = [plan.rows[i] for i in together]
            results.update(zip(together, self._run_together(rows), strict=True))
        ordered = tuple(results[i] for i in range(len(plan.rows)))
        return StepResult(number=plan.number, rows=ordered, duration_s=time.perf_counter() - began)

    def _row_fault(self, row: StepRow, seen: Set[int]) -> str | None:
        if row.handle in seen:
            return f"handle {row.handle} has two rows in one step"
        fault = self._sequences.row_fault(row)
        if fault is not None:
            return fault
        return table_fault(row, self._state(row).table, blocks=self._cache.blocks, block_size=self._cache.layout.block_size)

    def _run_together(self, rows: Sequence[StepRow]) -> list[RowResult]:
        if len(rows) < 2:
            return [self._run_alone(row) for row in rows]
        try:
            return self._run(rows)
        except Exception as error:
            logger.warning("step failed, running its rows one at a time", extra={"rows": len(rows), "error": type(error).__name__})
            return [self._run_alone(row) for row in rows]

    def _run_alone(self, row: StepRow) -> RowResult:
        try:
            return self._run_scored(row) if row.prompt_logprobs else self._run([row])[0]
        except Exception as error:
            return self._failed(row, f"{type(error).__name__}: {error}")

    def _run(self, rows: Sequence[StepRow]) -> list[RowResult]:
        """One forward; nothing is remembered of it until all of it has worked."""
        states = [self._state(row) for row in rows]
        inputs = [
            _batch_row(row, state, row.start, row.start + row.count, (row.count - 1,) if row.sample else ())
            for row, state in zip(rows, states, strict=True)
        ]
        logits = self._forward.logits(self._cache, inputs)
        drawn = iter(self._sampler.draw(logits, [state for row, state in zip(rows, states, strict=True) if row.sample]))
        return [self._row_result(row, next(drawn) if row.sample else None) for row in rows]

    def _run_scored(self, row: StepRow) -> RowResult:
        """The row in slices, each with the logits of all of its positions that predict a token of the prompt."""
        state = self._state(row)
        end, scored_end = row.start + row.count, row.start + scored_positions(row, state)
        size = max(1, min(SLICE_POSITIONS, SLICE_LOGITS // self._forward.vocab_size))
        scores: list[PositionLogprobs] = []
        drawn: Drawn | None = None
        for first in range(row.start, end, size):
            last = min(first + size, end)
            samples = row.sample and last == end
            scored = max(0, min(last, scored_end) - first)
            wanted = [*range(scored), last - 1 - first] if samples else range(scored)
            logits = self._forward.logits(self._cache, [_batch_row(row, state, first, last, wanted)])
            found = self._scores(logits[:scored], state, first)
            if found is None:
                return self._failed(row, NOT_FINITE)
            scores += found
            if samples:
                drawn = self._sampler.draw(logits[-1:], [state])[0]
        return self._row_result(row, drawn, tuple(scores))

    def _scores(self, logits: torch.Tensor, state: SequenceState, first: int) -> list[PositionLogprobs] | None:
        """Of the prompt's tokens at `first + 1 ..`, from the logits of `first ..`, without penalties or bias."""
        following = state.tokens[first + 1 : first + 1 + len(logits)]
        return self._sampler.score(logits, following, state.sampling.prompt_logprobs or 0)

    def _row_result(self, row: StepRow, drawn: Drawn | None, scores: tuple[PositionLogprobs, ...] = ()) -> RowResult:
        if drawn is None:
            return RowResult(handle=row.handle, prompt_logprobs=scores)
        if drawn.fault is not None:
            return self._failed(row, drawn.fault)
        self._state(row).append(drawn.token)
        return RowResult(handle=row.handle, token=drawn.token, logprobs=drawn.logprobs, prompt_logprobs=scores)

    def _failed(self, row: StepRow, fault: str) -> RowResult:
        state = self._sequences.get(row.handle)
        if state is not None:
            state.failed = fault
        return RowResult(handle=row.handle, fault=fault)

    def _state(self, row: StepRow) -> SequenceState:
        state = self._sequences.get(row.handle)
        assert state is not None, "rows are checked before they run"
        return state


def _batch_row(row: StepRow, state: SequenceState, first: int, last: int, kept: Sequence[int]) -> BatchRow:
    return BatchRow(tokens=state.tokens[first:last], start=first, blocks=row.blocks, kept=kept, table=state.table)
