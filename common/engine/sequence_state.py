"""The sequences that an executor knows, by handle: their tokens so far and what sampling has to remember. No tensors."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from common.engine.block_table import BlockTable
from common.engine.draw_row import DrawArrays, DrawRow
from common.engine.token_counts import TokenCounts
from common.ports.grammar_mask import GrammarMask, GrammarMasks
from common.values.errors import InvariantBroken
from common.values.step import SequenceStart, StepRow


class SequenceState:
    """One started sequence. `failed` is sticky: once a row has faulted, later rows of the sequence fault as well."""

    def __init__(self, start: SequenceStart) -> None:
        self.handle = start.handle
        self.choice = start.choice
        self.prompt_length = start.prompt_length
        self.tokens = list(start.tokens)
        self.sampling = start.sampling
        self.eos_token_ids = start.eos_token_ids
        self.failed: str | None = None
        self.table = BlockTable()
        self.mask: GrammarMask | None = None
        self._allowed: NDArray[np.int32] | None = None
        self._counts: TokenCounts | None = None
        self._draw: DrawArrays | None = None

    @property
    def new_tokens(self) -> int:
        """How many new tokens exist: the index of the next one."""
        return len(self.tokens) - self.prompt_length

    @property
    def penalised(self) -> bool:
        sampling = self.sampling
        return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0

    @property
    def masked_tokens(self) -> tuple[int, ...]:
        """Tokens that may not be drawn now, because `min_tokens` is not reached."""
        if self.new_tokens >= self.sampling.min_tokens:
            return ()
        return self._end_tokens

    @property
    def _end_tokens(self) -> tuple[int, ...]:
        return self.eos_token_ids + self.sampling.stop_token_ids

    def allowed(self, vocabulary: int) -> NDArray[np.int32] | None:
        """What the sequence's grammar allows next, as GrammarMask has it; None for all."""
        words = None if self.mask is None else self.mask.allowed()
        if words is not None and (words.dtype != np.int32 or words.size * 32 < vocabulary or not words.flags.c_contiguous):
            raise InvariantBroken(f"a grammar's mask of {words.size} words ({words.dtype}) does not cover {vocabulary} tokens")
        return words

    def draw_row(self, vocabulary: int) -> DrawRow:
        """What the kernels need for the next token; good until the sequence grows."""
        if self._draw is None:
            self._draw = DrawArrays(self.sampling, choice=self.choice, masked_tokens=self._end_tokens)
        row = self._draw.row
        row.position = len(self.tokens) - self.prompt_length
        if self.penalised:
            row.counted, row.counted_tokens, row.output_counts = self.counts.addresses
        if self.mask is not None:
            self._allowed = self.allowed(vocabulary)
            row.allowed = None if self._allowed is None else self._allowed.ctypes.data
        return row

    @property
    def counts(self) -> TokenCounts:
        if self._counts is None:
            self._counts = TokenCounts(self.tokens[: self.prompt_length], self.tokens[self.prompt_length :])
        return self._counts

    def append(self, token: int) -> None:
        self.tokens.append(token)
        if self._counts is not None:
            self._counts.add(token)
        if self.mask is not None:
            self._accept(token)

    def begin_grammar(self, masks: GrammarMasks, start: SequenceStart) -> None:
        """The mask of a sequence that starts, brought to where its new tokens are."""
        try:
            self.mask = masks.mask(start)
        except Exception as error:  # a grammar is the client's: what it breaks is its own sequence
            self.failed = f"the grammar was refused: {type(error).__name__}: {error}"
            return
        if self.mask is not None:
            for token in start.tokens[start.prompt_length :]:
                self._accept(token)

    def _accept(self, token: int) -> None:
        assert self.mask is not None
        try:
            self.mask.accept(token)
        except Exception as error:  # as above; the token was drawn, so it stands, and the next step finds the sequence failed
            self.failed = f"the grammar refused a token: {type(error).__name__}: {error}"


class SequenceTable:
    """Handles to sequences. `vocab_size` is the number of tokens that the model can take in."""

    def __init__(self, *, vocab_size: int, masks: GrammarMasks | None = None) -> None:
        self._vocab_size = vocab_size
        self._masks = masks
        self._states: dict[int, SequenceState] = {}

    def __len__(self) -> int:
        return len(self._states)

    def apply(self, ends: Iterable[int], starts: Iterable[SequenceStart]) -> None:
        """Forget `ends` (unknown handles are let pass), then make `starts` known."""
        for handle in ends:
            self._states.pop(handle, None)
        for start in starts:
            if start.handle in self._states:
                raise InvariantBroken(f"handle {start.handle} was started twice without an end")
            state = SequenceState(start)
            state.failed = self._refusal(state)
            if self._masks is not None and state.failed is None:
                state.begin_grammar(self._masks, start)
            self._states[start.handle] = state

    def get(self, handle: int) -> SequenceState | None:
        return self._states.get(handle)

    def row_fault(self, row: StepRow) -> str | None:
        """Why this row cannot be computed, or None. Its block table is another question: `table_fault`."""
        state = self._states.get(row.handle)
        if state is None:
            return f"handle {row.handle} was never started"
        if state.failed is not None:
            return state.failed
        end = row.start + row.count
        if row.count < 1 or row.start < 0 or end > len(state.tokens):
            return f"positions {row.start} to {end} are not within the {len(state.tokens)} tokens of the sequence"
        if row.sample and end != len(state.tokens):
            return f"position {end - 1} is not the last of {len(state.tokens)}: no token can be drawn after it"
        return None

    def _refusal(self, state: SequenceState) -> str | None:
        if not 1 <= state.prompt_length <= len(state.tokens):
            return f"a prompt of {state.prompt_length} tokens cannot be the start of {len(state.tokens)} tokens"
        if min(state.tokens) < 0 or max(state.tokens) >= self._vocab_size:
            return f"a token id lies outside the model's vocabulary of {self._vocab_size}"
        if any(not 0 <= token < self._vocab_size for token in state.sampling.logit_bias):
            return f"logit_bias names a token outside the model's vocabulary of {self._vocab_size}"
        return None


def table_fault(row: StepRow, table: BlockTable, *, blocks: int, block_size: int) -> str | None:
    """Makes the row's block table the sequence's; or says why it does not serve: it must cover the row's positions and lie in the
    pool of `blocks` blocks."""
    end = row.start + row.count
    if len(row.blocks) * block_size < end:
        return f"{len(row.blocks)} blocks do not hold {end} positions"
    return table.replace(row.blocks, pool=blocks)


def scored_positions(row: StepRow, state: SequenceState) -> int:
    """How many positions of the row, from its start on, predict a token of the prompt (0 where none were asked for)."""
    if not row.prompt_logprobs:
        return 0
    return max(0, min(row.start + row.count, state.prompt_length - 1) - row.start)
