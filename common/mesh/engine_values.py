"""What goes into a sequence engine and what comes out: the values of the outer engine port."""

import math
from dataclasses import dataclass
from typing import Literal

import msgspec

from common.protocol.messages import StageSeconds
from common.values.ids import SequenceKey
from common.values.sampling import SamplingParameters
from common.values.tokens import NewTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What a sequence's work is ordered by; what it makes never depends on it. `deadline` of its first token, on this worker's
    clock; `tpot_s` of its later ones, None where nothing was promised. `expected_tokens`: predicted length of its answer."""

    deadline: float = math.inf
    tpot_s: float | None = None
    best_effort: bool = False
    gives_way: bool = False
    expected_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceJob:
    """A sequence to run. `given` are the new tokens that exist already.

    With `hand_off` the sequence stops after its first new token and waits to be kept, or released once it has moved.
    `after` names a sequence with the same prompt that is computed first: this one then finds its blocks in the prefix
    cache (n > 1 shares one prefill that way). A `suspect` gets blocks, but takes part in steps only once it is cleared.
    What was `accepted_before` in the mesh may pass the bound of the queue.
    """

    key: SequenceKey
    prompt: tuple[int, ...]
    sampling: SamplingParameters
    given: tuple[int, ...] = ()
    salt: bytes = b""
    hand_off: bool = False
    after: SequenceKey | None = None
    suspect: bool = False
    accepted_before: bool = False
    promise: Promise = Promise()


Verdict = Literal["accepted", "full", "never_fits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Landing:
    """Room for an import: `blocks[i]` takes the sequence's block `i`; those before `first_block` are known here already."""

    first_block: int
    blocks: tuple[int, ...]


class TokensMade(msgspec.Struct, frozen=True, kw_only=True):
    """New tokens, or an ending without one (a fault). `stages` with the first one that this engine made of the sequence."""

    key: SequenceKey
    new: NewTokens
    stages: StageSeconds | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FilledBlock:
    """Block `index` of a sequence lies in `block`; `valid` of its positions are computed (all, but in a prompt's last)."""

    index: int
    block: int
    valid: int
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksFilled:
    """Blocks of a sequence with `hand_off` that will not change any more; `complete` with the last of its prompt."""

    key: SequenceKey
    blocks: tuple[FilledBlock, ...]
    complete: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Preempted:
    """The pool was full: the sequence waits to be computed again; nothing is lost but time."""

    key: SequenceKey


EngineEvent = TokensMade | BlocksFilled | Preempted


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """Counts now, and totals since the start. `blocks_leased` are those of sequences between two workers: held for a hand-off,
    landing, or worked on outside the engine."""

    waiting: int
    running: int
    held: int
    queued_tokens: int
    blocks_free: int
    blocks_cached: int
    blocks_leased: int
    blocks_total: int
    preemptions: int
    prefix_hit_tokens: int
    computed_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePace:
    """How busy an engine is, in the units that placement is decided in; `common.values.worker.WorkerSnapshot` says what each is."""

    prefill_queue_s: float
    decoding: int
    decoding_kv_tokens: int
    stream_slack_s: float | None
    tokens_left: float
    reserved_tokens_free: int
