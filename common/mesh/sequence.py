"""The record of one sequence inside the engine."""

import math
from dataclasses import dataclass, field

from common.mesh.engine_values import SequenceJob
from common.mesh.sequence_life import TRANSITIONS, LifeEvent, Phase
from common.policy.block_hash import BlockHash
from common.values.errors import InvariantBroken
from common.values.tokens import PositionLogprobs

PATIENCE_S = 30.0
"""The objective of a prompt that names none: so it has its turn among those that do."""


@dataclass(slots=True, kw_only=True)
class Stamps:
    """Moments of a sequence on this worker's clock. `came_at`: queued, or activated after an import; `begun_at`: its first row
    was planned; both are `told` with the first token that is made here. A stream is measured against its TPOT objective from
    `paced_from` on, when it had `paced_tokens` new tokens."""

    came_at: float
    begun_at: float | None = None
    told: bool = False
    transfer_s: float | None = None
    paced_from: float | None = None
    paced_tokens: int = 0


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

    `begun` rises with the order in which prompts were begun; `passed_over` counts steps in a row that went to an urgent prompt
    while this one stood between two chunks.
    """

    job: SequenceJob
    arrived: int
    handle: int
    tokens: list[int]
    root: BlockHash
    stamps: Stamps
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
    suspect: bool = False
    barred: bool = False
    begun: int = 0
    passed_over: int = 0
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)

    def step(self, event: LifeEvent) -> None:
        following = TRANSITIONS[self.phase].get(event)
        if following is None:
            raise InvariantBroken(f"{event} of {self.job.key}, which is {self.phase}")
        self.phase = following

    @property
    def released(self) -> bool:
        return self.phase is Phase.RELEASED

    @property
    def at_rest(self) -> bool:
        """No step and nobody outside works on its blocks."""
        return not self.in_flight and not self.pins

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
    def deadline(self) -> float:
        """Of its first token."""
        deadline = self.job.promise.deadline
        return deadline if math.isfinite(deadline) else self.stamps.came_at + PATIENCE_S

    @property
    def goes_first(self) -> bool:
        """Before all prompts: a stream that a client waits for in its middle, or one that a lost worker has delayed already."""
        return self.new_tokens > 0 or self.suspect or self.preempted

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Asked for, and not yet delivered with the first token."""
        return self.job.sampling.prompt_logprobs is not None and self.job.key.choice == 0 and self.new_tokens == 0

    @property
    def is_protected(self) -> bool:
        """Its blocks are written in a step, worked on outside, or offered to a peer."""
        return not self.at_rest or (self.job.hand_off and self.reported > 0)

    def check_invariants(self) -> None:
        if self.phase is Phase.WAITING and (self.blocks or self.in_flight):
            raise InvariantBroken(f"{self.job.key} waits, and holds blocks or takes part in a step")
        if self.phase is Phase.HELD and (not self.job.hand_off or self.in_flight) and not self.keep_when_unpinned:
            raise InvariantBroken(f"{self.job.key} is held for no hand-off, or computed while it is held")
        if self.phase is not Phase.WAITING and self.computed > len(self.tokens):
            raise InvariantBroken(f"{self.job.key} has computed more than it has tokens for")
