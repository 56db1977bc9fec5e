"""The record of one sequence inside the engine."""

from dataclasses import dataclass, field
from enum import Enum

from common.mesh.engine_values import SequenceJob
from common.policy.block_hash import BlockHash
from common.values.tokens import PositionLogprobs


class Phase(Enum):
    """WAITING: no blocks, in the queue. RUNNING: has blocks, takes part in steps. HELD: prompt and first token are done,
    a hand-off decides. LANDING: blocks are being imported."""

    WAITING = "waiting"
    RUNNING = "running"
    HELD = "held"
    LANDING = "landing"


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """`tokens` is the prompt followed by all new tokens; K and V of positions below `computed` are in `blocks`.

    `handle` names it to the step engine; a sequence that starts again (after preemption) gets a new one.
    `preempted` once it has lost its blocks: while it waits, room goes to it before it goes to imports.
    `reported` blocks were announced as filled, `named` blocks are in the prefix index. While `pins` is above zero somebody
    outside the engine works on its blocks: they are neither freed nor written to.

    Of the steps under way, `in_flight` hold a row of it and `samples_in_flight` will draw a token of it; they compute the
    positions from `computed` up to `planned`.

    `suspect` until its next token: it was recovered from a lost worker. While it is `barred` it takes part in no step.
    """

    job: SequenceJob
    arrived: int
    handle: int
    tokens: list[int]
    root: BlockHash
    phase: Phase = Phase.WAITING
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)
    named: int = 0
    reported: int = 0
    announced: bool = False
    planned: int = 0
    in_flight: int = 0
    samples_in_flight: int = 0
    preempted: bool = False
    pins: int = 0
    keep_when_unpinned: bool = False
    released: bool = False
    suspect: bool = False
    barred: bool = False
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)

    @property
    def prompt_length(self) -> int:
        return len(self.job.prompt)

    @property
    def new_tokens(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def remaining(self) -> int:
        """Positions to compute before the next token can be drawn."""
        return len(self.tokens) - self.computed

    @property
    def unplanned(self) -> int:
        """Positions to plan for before the next token can be drawn, those of tokens that are being drawn included."""
        return len(self.tokens) + self.samples_in_flight - self.planned

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Asked for, and not yet delivered with the first token."""
        return self.job.sampling.prompt_logprobs is not None and self.job.key.choice == 0 and self.new_tokens == 0
