"""Which steps are measured: chunks of prompts by length and past, decode steps by rows and context, and some of both at once.

Enough of each that no coefficient is extrapolated where a worker of this size will work, few enough that all fit several times
into a minute.
"""

from dataclasses import dataclass

CHUNKS = (16, 64, 128, 256, 512, 1024, 2048)
PASTS = (512, 1536, 4096)
CHUNKS_AFTER = (64, 256)
"""The lengths that are measured after each past."""
ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
CONTEXTS = (64, 256, 1024, 4096)
MIXED_CHUNKS = (32, 128)
MIXED_ROWS = (2, 8)
MIXED_CONTEXT = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkShape:
    tokens: int
    past: int = 0

    @property
    def positions(self) -> int:
        """That its KV needs in the pool."""
        return self.past + self.tokens

    @property
    def effort(self) -> float:
        """Roughly, in prompt tokens."""
        return self.tokens * (1.0 + self.past / 4096)

    def __str__(self) -> str:
        return f"prefill {self.tokens} after {self.past}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsShape:
    """`context`: cached tokens that each row reads."""

    rows: int
    context: int

    @property
    def positions(self) -> int:
        return self.rows * self.context

    @property
    def effort(self) -> float:
        """Of one visit, roughly, in prompt tokens."""
        return 40.0 + 4.0 * self.rows + self.positions / 64

    def __str__(self) -> str:
        return f"decode {self.rows} x {self.context}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedShape:
    chunk: ChunkShape
    rows: RowsShape

    @property
    def positions(self) -> int:
        return self.chunk.positions + self.rows.positions

    @property
    def effort(self) -> float:
        return self.chunk.effort + self.rows.effort

    def __str__(self) -> str:
        return f"{self.chunk} beside {self.rows}"


StepShape = ChunkShape | RowsShape | MixedShape


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeLimits:
    """`kv_tokens` of the pool, `max_tokens` of one sequence, `max_rows` of one step, and the longest chunk."""

    kv_tokens: int
    max_tokens: int
    max_rows: int
    max_chunk: int


def step_shapes(limits: ShapeLimits) -> tuple[StepShape, ...]:
    """From the quickest to the longest, so that a slow machine has measured the quick ones when its time is up."""
    chunks = [ChunkShape(tokens=tokens) for tokens in CHUNKS]
    chunks += [ChunkShape(tokens=tokens, past=past) for past in PASTS for tokens in CHUNKS_AFTER]
    rows = [RowsShape(rows=count, context=context) for context in CONTEXTS for count in ROWS]
    mixed = [
        MixedShape(chunk=ChunkShape(tokens=tokens), rows=RowsShape(rows=count, context=MIXED_CONTEXT))
        for tokens in MIXED_CHUNKS
        for count in MIXED_ROWS
    ]
    shapes: list[StepShape] = [*chunks, *rows, *mixed]
    return tuple(sorted((shape for shape in shapes if _fits(shape, limits)), key=lambda shape: (shape.effort, str(shape))))


def _fits(shape: StepShape, limits: ShapeLimits) -> bool:
    match shape:
        case ChunkShape():
            return shape.tokens <= limits.max_chunk and shape.positions < min(limits.max_tokens, limits.kv_tokens)
        case RowsShape():
            room = _rounded(shape) <= limits.kv_tokens and shape.context < limits.max_tokens
            return room and shape.rows <= limits.max_rows
        case MixedShape():
            room = shape.chunk.positions + _rounded(shape.rows) <= limits.kv_tokens
            return room and _fits(shape.chunk, limits) and _fits(shape.rows, limits)


ROOM_TOKENS = 64
"""What a row gets beyond its context: the tokens that the measured steps add, and the rest of a block."""


def _rounded(shape: RowsShape) -> int:
    return shape.rows * (shape.context + ROOM_TOKENS)
