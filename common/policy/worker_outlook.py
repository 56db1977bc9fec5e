"""A worker as placement sees it: its snapshot, and what this gateway has sent there that no snapshot shows yet.

A worker that has measured its steps is asked by its step-time model; one of an older release, or before its first steps, by
its averages, else by guesses that make all such workers alike.
"""

import math
from dataclasses import dataclass

from common.policy.free_placement import StreamLoad
from common.policy.step_time import DecodeLine, DecodeTime, PrefillTime, StepTime
from common.policy.step_time_coefficients import step_time_of
from common.values.ids import WorkerId
from common.values.worker import WorkerSnapshot

STEP_TOKENS = 256
"""Positions of one step: what workers do unless they are told otherwise."""
GUESSED_PREFILL_TOKEN_S = 1e-3
GUESSED_STEP_S = 1e-2
SEQUENCE_SHARE = 0.1
"""Of a measured step, for each further sequence in it, where there is only that average."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingLoad:
    """Dispatched to a worker, not yet in its snapshots: prompt `tokens` to compute, `sequences` to decode with so many
    `context_tokens` between them."""

    sequences: int = 0
    tokens: int = 0
    context_tokens: int = 0

    def __add__(self, other: "PendingLoad") -> "PendingLoad":
        return PendingLoad(
            sequences=self.sequences + other.sequences,
            tokens=self.tokens + other.tokens,
            context_tokens=self.context_tokens + other.context_tokens,
        )

    def __sub__(self, other: "PendingLoad") -> "PendingLoad":
        return PendingLoad(
            sequences=self.sequences - other.sequences,
            tokens=self.tokens - other.tokens,
            context_tokens=self.context_tokens - other.context_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOutlook:
    """`load` is with the slack of its streams. `room_tokens`: KV that is promised to nobody. `left_s`: how long its streams will run
    yet, in the mean. `cached`: tokens of the request's prompt that it holds."""

    snapshot: WorkerSnapshot
    time: StepTime
    load: StreamLoad
    room_tokens: float
    left_s: float
    waiting: int
    cached: int

    @property
    def worker(self) -> WorkerId:
        return self.snapshot.worker

    @property
    def mixes(self) -> bool:
        """Whether a prompt there is computed beside streams."""
        return self.snapshot.role != "prefill" or self.load.sequences > 0

    def transfer_s(self, tokens: int) -> float:
        return self.snapshot.transfer_base_s + self.snapshot.transfer_per_token_s * tokens


def outlook_of(snapshot: WorkerSnapshot, pending: PendingLoad, cached: int, time: StepTime | None = None) -> WorkerOutlook:
    """`time` is the snapshot's, where the caller has it at hand."""
    time = time or snapshot_time(snapshot)
    measured = snapshot.step_time is not None
    sequences = (snapshot.decoding if measured else snapshot.running + snapshot.waiting) + pending.sequences
    kv_tokens = float(snapshot.decoding_kv_tokens + pending.context_tokens)
    queued_s = snapshot.prefill_queue_s if measured else time.prefill.chunk_s(snapshot.queued_tokens)
    step_s = time.decode.seconds(sequences, kv_tokens) if sequences else 0.0
    return WorkerOutlook(
        snapshot=snapshot,
        time=time,
        load=StreamLoad(
            sequences=sequences,
            kv_tokens=kv_tokens,
            slack_s=math.inf if snapshot.stream_slack_s is None else snapshot.stream_slack_s,
            queue_s=queued_s + time.prefill.chunk_s(pending.tokens),
        ),
        room_tokens=_room(snapshot, sequences) - pending.context_tokens,
        left_s=snapshot.tokens_left * step_s,
        waiting=snapshot.waiting + snapshot.running + pending.sequences + (pending.tokens > 0),
        cached=cached,
    )


def snapshot_time(snapshot: WorkerSnapshot) -> StepTime:
    if snapshot.step_time is not None:
        return step_time_of(snapshot.step_time)
    step_s = snapshot.seconds_per_step or GUESSED_STEP_S
    line = DecodeLine(base_s=step_s, per_kv_token_s=0.0, per_sequence_s=SEQUENCE_SHARE * step_s)
    per_token_s = snapshot.seconds_per_prefill_token or GUESSED_PREFILL_TOKEN_S
    return StepTime(prefill=PrefillTime(base_s=0.0, per_token_s=per_token_s), decode=DecodeTime(line=line))


def _room(snapshot: WorkerSnapshot, sequences: int) -> float:
    """None is left where all places for sequences are taken."""
    if sequences >= snapshot.max_num_seqs:
        return 0.0
    if snapshot.reserved_tokens_free is not None:
        return float(snapshot.reserved_tokens_free)
    return float((snapshot.blocks_free + snapshot.blocks_cached) * snapshot.fingerprint.layout.block_size)
