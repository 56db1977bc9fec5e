"""How busy an engine is: what its snapshot tells the mesh."""

import math
from collections.abc import Iterable

from common.mesh.engine_values import EnginePace
from common.mesh.sequence import Sequence
from common.mesh.sequence_blocks import SequenceBlocks
from common.mesh.sequence_life import Phase
from common.mesh.stream_pace import pace_of, tokens_left
from common.policy.step_time import StepTime


def pace(sequences: Iterable[Sequence], waiting_s: float, time: StepTime, blocks: SequenceBlocks, now: float) -> EnginePace:
    """`waiting_s` is the predicted work of the prompts that wait."""
    known = list(sequences)
    streams = [s for s in known if s.phase is Phase.RUNNING and s.remaining == 1 and s.new_tokens]
    begun = [s for s in known if s.phase is Phase.RUNNING and s.remaining > 1]
    streams_pace = pace_of(streams, time, now)
    slack_s = streams_pace.load.slack_s
    promised = sum(len(s.tokens) + tokens_left(s) for s in known)
    return EnginePace(
        prefill_queue_s=waiting_s + sum(time.prefill.seconds(s.remaining, s.computed) for s in begun),
        decoding=len(streams),
        decoding_kv_tokens=int(streams_pace.load.kv_tokens),
        stream_slack_s=slack_s if math.isfinite(slack_s) else None,
        tokens_left=streams_pace.tokens_left,
        reserved_tokens_free=max(0, blocks.pool.total * blocks.layout.block_size - math.ceil(promised)),
    )


def leased_blocks(owners: Iterable[Sequence]) -> int:
    """Blocks of sequences between two workers: held for a hand-off, landing, or worked on outside the engine."""
    between = (Phase.HELD, Phase.LANDING, Phase.ABANDONED)
    return len(blocks_owned(s for s in owners if s.phase in between or s.pins))


def blocks_owned(sequences: Iterable[Sequence]) -> set[int]:
    return {block for sequence in sequences for block in sequence.blocks}
