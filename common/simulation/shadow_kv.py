"""A KV pool and a step engine without tensors: every slot remembers the prefix from which it was computed.

A step checks that each position which it reads through the block table holds the KV of this very sequence, so wrong
sharing, early frees and writes into foreign blocks show themselves at the next read. The next token is a function of all
tokens so far, the choice and the seed; `reference` says what a sequence makes alone.
"""

import zlib
from collections import deque
from dataclasses import dataclass
from typing import Literal

from common.mesh.sequence_engine import STEPS_AHEAD
from common.values.errors import InvariantBroken
from common.values.sampling import SamplingParameters
from common.values.step import RowResult, SequenceStart, StepPlan, StepResult, StepRow
from common.values.tokens import Ending, PositionLogprobs

VOCABULARY = 30
EOS = (29,)
FAULTY_SEED = 666
"""A sequence with this seed fails when its third new token is due."""


def chain(tokens: tuple[int, ...] | list[int]) -> list[int]:
    """The content of each position: a digest of the tokens up to and with it."""
    values, value = [], 0
    for token in tokens:
        value = hash((value, token))
        values.append(value)
    return values


def next_token(tokens: tuple[int, ...] | list[int], choice: int, seed: int) -> int:
    return hash((chain(tokens)[-1], choice, seed)) % VOCABULARY


def reference(prompt: tuple[int, ...], sampling: SamplingParameters, choice: int, max_model_len: int) -> tuple[list[int], Ending]:
    """What a sequence makes alone: its new tokens, and why it ended."""
    tokens = list(prompt)
    while True:
        if sampling.seed == FAULTY_SEED and len(tokens) - len(prompt) == 2:
            ending = Ending(reason="error", error_code="sequence_fault", error_message="planted")
            return tokens[len(prompt) :], ending
        tokens.append(next_token(tokens, choice, sampling.seed))
        new = tokens[len(prompt) :]
        if new[-1] in sampling.stop_token_ids or (new[-1] in EOS and not sampling.ignore_eos):
            return new, Ending(reason="stop", stop_token=new[-1])
        if len(new) >= sampling.max_tokens or len(tokens) >= max_model_len:
            return new, Ending(reason="length")


class ShadowKv:
    """`generations` is shared with the block pool."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.generations = [0] * blocks
        self._slots: list[list[int | None]] = [[None] * block_size for _ in range(blocks)]

    def read(self, blocks: tuple[int, ...], position: int) -> int | None:
        return self._slots[blocks[position // self.block_size]][position % self.block_size]

    def write(self, blocks: tuple[int, ...], position: int, value: int) -> None:
        self._slots[blocks[position // self.block_size]][position % self.block_size] = value

    def checksum(self, block: int) -> bytes:
        return zlib.crc32(repr(self._slots[block]).encode()).to_bytes(16, "big")

    def seal(self, block: int, valid: int) -> bytes:
        """Zero what is not valid, and sum up."""
        self._slots[block][valid:] = [None] * (self.block_size - valid)
        return self.checksum(block)

    def copy_from(self, other: "ShadowKv", source: int, landing: int) -> None:
        self._slots[landing] = list(other._slots[source])

    def copy_slots(self, other: "ShadowKv", source: int, landing: int, slots: slice) -> None:
        """A part of a block: copies take time, and the source may change meanwhile."""
        self._slots[landing][slots] = other._slots[source][slots]

    def content(self, block: int) -> list[int | None]:
        return list(self._slots[block])

    def write_block(self, block: int, content: list[int | None]) -> None:
        self._slots[block] = list(content)

    def spoil(self, block: int) -> None:
        """A copy that went wrong left something there."""
        self._slots[block] = [-1] * self.block_size


@dataclass(slots=True)
class _Known:
    start: SequenceStart
    tokens: list[int]


class ShadowStep:
    """Steps are computed when `perform` is called, as late as possible: what the plan named must still be its own then."""

    def __init__(self, kv: ShadowKv) -> None:
        self._kv = kv
        self._known: dict[int, _Known] = {}
        self._used: set[int] = set()
        self._plans: deque[tuple[StepPlan, dict[int, int]]] = deque()
        self._faulty: set[int] = set()

    @property
    def busy(self) -> bool:
        return bool(self._plans)

    @property
    def known(self) -> int:
        """Sequences that no plan has ended yet."""
        return len(self._known)

    def submit(self, plan: StepPlan) -> None:
        _require(len(self._plans) < STEPS_AHEAD, "too many steps under way")
        self._plans.append((plan, {b: self._kv.generations[b] for row in plan.rows for b in row.blocks}))

    def perform(self) -> StepResult:
        plan, generations = self._plans.popleft()
        for handle in plan.ends:
            del self._known[handle]
        for start in plan.starts:
            _require(start.handle not in self._used, "a handle is used once")
            self._used.add(start.handle)
            self._known[start.handle] = _Known(start, list(start.tokens))
        for block, generation in generations.items():
            _require(self._kv.generations[block] == generation, "a block of a running step was given to somebody else")
        chains = [self._check_row(row) for row in plan.rows]
        self._check_writes(plan.rows)
        return StepResult(number=plan.number, rows=tuple(map(self._compute, plan.rows, chains)), duration_s=0.0)

    def _check_row(self, row: StepRow) -> list[int]:
        tokens = self._known[row.handle].tokens
        if row.handle in self._faulty:
            return []
        _require(row.count >= 1 and row.start + row.count <= len(tokens), "a row computes nothing, or more than there is")
        _require(row.sample == (row.start + row.count == len(tokens)), "a row samples too early, or too late")
        _require(len(row.blocks) == len(set(row.blocks)), "a block stands twice in a block table")
        _require(row.start + row.count <= len(row.blocks) * self._kv.block_size, "the block table is too short")
        values = chain(tokens)
        for position in range(row.start):
            if self._kv.read(row.blocks, position) != values[position]:
                raise InvariantBroken(f"position {position} holds another content")
        return values

    def _check_writes(self, rows: tuple[StepRow, ...]) -> None:
        size = self._kv.block_size
        for row in rows:
            written = set(row.blocks[row.start // size : -(-(row.start + row.count) // size)])
            others = {block for other in rows if other is not row for block in other.blocks}
            _require(not written & others, "a step writes into a block that another of its rows uses")

    def _compute(self, row: StepRow, values: list[int]) -> RowResult:
        known = self._known[row.handle]
        start, tokens = known.start, known.tokens
        if row.sample and start.sampling.seed == FAULTY_SEED and len(tokens) - start.prompt_length == 2:
            self._faulty.add(row.handle)
        if row.handle in self._faulty:
            return RowResult(handle=row.handle, fault="planted")
        for position in range(row.start, row.start + row.count):
            self._kv.write(row.blocks, position, values[position])
        prompt_logprobs: tuple[PositionLogprobs, ...] = ()
        if row.prompt_logprobs:
            positions = range(row.start + 1, min(row.start + row.count + 1, start.prompt_length))
            prompt_logprobs = tuple(logprob_of(position) for position in positions)
        if not row.sample:
            return RowResult(handle=row.handle, prompt_logprobs=prompt_logprobs)
        logprobs = None if start.sampling.logprobs is None else logprob_of(len(tokens))
        tokens.append(next_token(tokens, start.choice, start.sampling.seed))
        return RowResult(handle=row.handle, token=tokens[-1], logprobs=logprobs, prompt_logprobs=prompt_logprobs)


def logprob_of(position: int) -> PositionLogprobs:
    """Recognisable by position."""
    return PositionLogprobs(logprob=-float(position), rank=1)


def pull_outcome(
    mine: ShadowKv,
    peer: ShadowKv,
    source: int,
    landing: int,
    generation: int,
    checksum: bytes,
) -> Literal["copied", "generation", "checksum"]:
    """Copy one block as a mapped tier does: the fence, then the sum over the own bytes."""
    mine.copy_from(peer, source, landing)
    if peer.generations[source] != generation:
        return "generation"
    return "copied" if mine.checksum(landing) == checksum else "checksum"


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise InvariantBroken(what)
