"""What a step made of a sequence: its next token, or its end, and the blocks that a hand-off may take now."""

from collections.abc import Iterator

from common.mesh.engine_values import BlocksFilled, FilledBlock, TokensMade
from common.mesh.sequence import Sequence
from common.mesh.sequence_blocks import SequenceBlocks
from common.mesh.sequence_life import Phase
from common.protocol.messages import StageSeconds
from common.values.errors import InvariantBroken
from common.values.step import RowResult, StepRow
from common.values.tokens import Ending, NewTokens


class StepOutcome:
    """One per engine; `eos` end a sequence unless its sampling ignores them."""

    def __init__(self, blocks: SequenceBlocks, eos: frozenset[int], max_model_len: int) -> None:
        self._blocks = blocks
        self._eos = eos
        self._max_model_len = max_model_len

    def apply(self, sequence: Sequence, row: StepRow, outcome: RowResult, now: float) -> TokensMade | None:
        """The token that the row drew, if any. One with an ending is the sequence's last; the engine releases it."""
        if outcome.fault is not None:
            ending = Ending(reason="error", error_code="sequence_fault", error_message=outcome.fault)
            return TokensMade(key=sequence.job.key, new=NewTokens(first=sequence.new_tokens, tokens=(), ending=ending))
        sequence.prompt_logprobs.extend(outcome.prompt_logprobs)
        sequence.computed += row.count
        self._blocks.name_full(sequence)
        if not row.sample:
            return None
        if outcome.token is None:
            raise InvariantBroken(f"step {row.handle}: a row that samples has no token")
        new = self._extend(sequence, outcome.token, outcome)
        if new.ending is None and sequence.job.hand_off and not sequence.in_flight:
            sequence.step("hold")
        return TokensMade(key=sequence.job.key, new=new, stages=_stages(sequence, now))

    def _extend(self, sequence: Sequence, token: int, outcome: RowResult) -> NewTokens:
        first = sequence.new_tokens
        prompt_logprobs = tuple(sequence.prompt_logprobs) if sequence.wants_prompt_logprobs else None
        sequence.tokens.append(token)
        sequence.suspect = False
        return NewTokens(
            first=first,
            tokens=(token,),
            logprobs=(outcome.logprobs,) if outcome.logprobs is not None else (),
            prompt_logprobs=prompt_logprobs,
            ending=self._ending(sequence, token),
        )

    def _ending(self, sequence: Sequence, token: int) -> Ending | None:
        sampling = sequence.job.sampling
        if token in sampling.stop_token_ids or (token in self._eos and not sampling.ignore_eos):
            return Ending(reason="stop", stop_token=token)
        if sequence.new_tokens >= sampling.max_tokens or len(sequence.tokens) >= self._max_model_len:
            return Ending(reason="length")
        return None

    def filled(self, sequence: Sequence) -> Iterator[BlocksFilled]:
        """Blocks of a prompt that is to be handed off: full ones after each chunk, the last one when the prompt is done."""
        if not sequence.job.hand_off:
            return
        size = self._blocks.layout.block_size
        positions = min(sequence.computed, len(sequence.tokens))
        complete = sequence.phase is Phase.HELD
        last = self._blocks.layout.blocks_for(positions) if complete else positions // size
        if last > sequence.reported or complete:
            blocks = tuple(
                FilledBlock(
                    index=i,
                    block=sequence.blocks[i],
                    valid=min(size, positions - i * size),
                    generation=self._blocks.pool.generation(sequence.blocks[i]),
                )
                for i in range(sequence.reported, last)
            )
            sequence.reported = last
            yield BlocksFilled(key=sequence.job.key, blocks=blocks, complete=complete)


def _stages(sequence: Sequence, now: float) -> StageSeconds | None:
    """With the first token that is made here; the stream is paced from it on, where it did not come with a pace."""
    stamps = sequence.stamps
    if stamps.told or stamps.begun_at is None:
        return None
    stamps.told = True
    if stamps.paced_from is None:
        stamps.paced_from, stamps.paced_tokens = now, sequence.new_tokens
    waited_s = stamps.begun_at - stamps.came_at
    if stamps.transfer_s is not None:
        return StageSeconds(transfer_s=stamps.transfer_s, decode_queue_s=waited_s)
    stays_s = None if sequence.job.hand_off else 0.0
    return StageSeconds(prefill_queue_s=waited_s, prefill_s=now - stamps.begun_at, transfer_s=stays_s, decode_queue_s=stays_s)
