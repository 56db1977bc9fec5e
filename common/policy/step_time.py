"""How long a step takes: the one model that routing, admission, the simulator and the planner predict with.

A prefill of `tokens` after `past` costs a + b·tokens + c·tokens·(past + tokens/2): weights once, linears by token, attention by
pair. A decode step costs a + b·kv + c·n, with another line from a knee on (the batch leaves the memory-bound regime; DistServe's
profiles have the same two). All times are seconds.
"""

from collections.abc import Iterable
from dataclasses import dataclass

SATURATED_SHARE = 0.1
"""A batch is saturated once a step's fixed cost is at most this share of it: longer ones gain no throughput worth waiting for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """`tokens` of a prompt, computed when `past` of it are in the cache."""

    tokens: int
    past: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillTime:
    base_s: float
    per_token_s: float
    per_pair_s: float = 0.0

    def seconds(self, tokens: int, past: int = 0) -> float:
        return self.base_s + self.chunk_s(tokens, past)

    def chunk_s(self, tokens: int, past: int = 0) -> float:
        """What a chunk adds to a step that runs anyway."""
        return self.per_token_s * tokens + self.per_pair_s * tokens * (past + 0.5 * tokens)

    def batch_s(self, chunks: Iterable[Chunk]) -> float:
        return self.base_s + sum(self.chunk_s(chunk.tokens, chunk.past) for chunk in chunks)

    def chunked_s(self, tokens: int, past: int, chunk_tokens: int) -> float:
        """A prompt alone, in chunks: the base is paid by each."""
        return -(-tokens // chunk_tokens) * self.base_s + self.chunk_s(tokens, past)

    @property
    def saturation_tokens(self) -> int:
        """From this many tokens a step on, throughput is near its best."""
        if self.per_token_s <= 0.0:
            return 1
        return max(1, round(self.base_s * (1.0 - SATURATED_SHARE) / (SATURATED_SHARE * self.per_token_s)))


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLine:
    base_s: float
    per_kv_token_s: float
    per_sequence_s: float

    def seconds(self, sequences: int, kv_tokens: float) -> float:
        return self.base_s + self.per_kv_token_s * kv_tokens + self.per_sequence_s * sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTime:
    """`beyond` holds from `knee` sequences on; None: one line for all."""

    line: DecodeLine
    knee: int | None = None
    beyond: DecodeLine | None = None

    def __post_init__(self) -> None:
        if (self.knee is None) != (self.beyond is None):
            raise ValueError("a knee has a line beyond it")

    def line_at(self, sequences: int) -> DecodeLine:
        if self.beyond is None or self.knee is None or sequences < self.knee:
            return self.line
        return self.beyond

    def seconds(self, sequences: int, kv_tokens: float) -> float:
        """`kv_tokens`: all the cached tokens that the step reads, over all its sequences."""
        return self.line_at(sequences).seconds(sequences, kv_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    prefill: PrefillTime
    decode: DecodeTime

    def mixed_s(self, chunks: Iterable[Chunk], sequences: int, kv_tokens: float) -> float:
        """A step of prompt chunks beside decode rows."""
        return self.beside_s(sequences, kv_tokens) + sum(self.prefill.chunk_s(chunk.tokens, chunk.past) for chunk in chunks)

    def beside_s(self, sequences: int, kv_tokens: float) -> float:
        """What such a step takes without the chunks' own work: the weights are read once, so only the larger base counts."""
        if not sequences:
            return self.prefill.base_s
        line = self.decode.line_at(sequences)
        return line.seconds(sequences, kv_tokens) + max(0.0, self.prefill.base_s - line.base_s)


UNKNOWN_STEP_TIME = StepTime(
    prefill=PrefillTime(base_s=0.0, per_token_s=0.0),
    decode=DecodeTime(line=DecodeLine(base_s=0.0, per_kv_token_s=0.0, per_sequence_s=0.0)),
)
"""Before anything was measured: nothing takes time, so no decision is made because of it."""
