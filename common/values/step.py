"""One step of the engine as a value: what to compute, and what came out.

A step mixes chunks of prompts with single decode rows. Sampled tokens stay inside the step engine as the next step's input,
so a plan never carries tokens that the engine itself made, and plan k+1 may go in before result k is read.
"""

from dataclasses import dataclass

import msgspec

from common.values.sampling import SamplingParameters
from common.values.tokens import PositionLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceStart:
    """Makes a sequence known to the step engine under `handle`, until a plan's `ends` names it.

    `tokens` is the prompt followed by the new tokens that exist already (after a hand-off, a recovery or a preemption);
    the first `prompt_length` of them are the prompt. `choice` enters the counter-based draws. `eos_token_ids` and the
    sampling's stop tokens are masked while fewer than `min_tokens` new tokens exist.
    """

    handle: int
    choice: int
    prompt_length: int
    tokens: tuple[int, ...]
    sampling: SamplingParameters
    eos_token_ids: tuple[int, ...]


class StepRow(msgspec.Struct, frozen=True, kw_only=True):
    """Compute positions `start .. start + count - 1` of a sequence; their K and V go into `blocks`.

    `blocks` is the block table from position 0 on and covers all of them. Positions before `start` are in the cache
    already. With `sample`, one token is drawn from the logits of the last position and appended to the sequence. With
    `prompt_logprobs`, log-probabilities are returned for the tokens at positions `start + 1 .. start + count` that
    belong to the prompt.
    """

    handle: int
    start: int
    count: int
    blocks: tuple[int, ...]
    sample: bool
    prompt_logprobs: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Applied in this order: `ends`, `starts`, `rows`. `number` rises by one a step."""

    number: int
    rows: tuple[StepRow, ...]
    starts: tuple[SequenceStart, ...] = ()
    ends: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(row.count for row in self.rows)


class RowResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a row made. `fault` (a message) means that this sequence alone has failed; its neighbours are untouched."""

    handle: int
    token: int | None = None
    logprobs: PositionLogprobs | None = None
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    fault: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """In the order of the plan's rows. `duration_s` is the time of the computation itself."""

    number: int
    rows: tuple[RowResult, ...]
    duration_s: float
