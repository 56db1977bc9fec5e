"""Greedy continuations by one executor, made by the plans that a worker would give it: batches of any size, prompts whole or in
chunks beside the decode rows of others."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.values.errors import SegueError
from common.values.sampling import SamplingParameters
from common.values.step import SequenceStart, StepPlan, StepRow

if TYPE_CHECKING:
    from common.engine.watched_forward import WatchedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """New tokens, and for each the digest of the logits that it was chosen from."""

    tokens: tuple[int, ...]
    bits: tuple[object, ...]


def greedy(new_tokens: int, *, logprobs: int | None = None) -> SamplingParameters:
    """Goes on past any end of text: all answers have one length."""
    return SamplingParameters(max_tokens=new_tokens, seed=0, temperature=0.0, ignore_eos=True, logprobs=logprobs)


def continuations(
    watched: "WatchedModel", prompts: Sequence[Sequence[int]], *, new_tokens: int, batch: int, chunk: int | None
) -> list[Continuation]:
    made: list[Continuation] = []
    for first in range(0, len(prompts), batch):
        made += _Batch(watched, prompts[first : first + batch], new_tokens, chunk).run()
    return made


@dataclass(slots=True)
class _Progress:
    handle: int
    prompt: Sequence[int]
    blocks: tuple[int, ...]
    computed: int = 0
    tokens: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)


class _Batch:
    """Sequences that are computed together, each in blocks of its own."""

    def __init__(self, watched: "WatchedModel", prompts: Sequence[Sequence[int]], new_tokens: int, chunk: int | None) -> None:
        self._watched = watched
        self._new_tokens = new_tokens
        self._chunk = chunk
        self._plans = 0
        self._all: list[_Progress] = []
        taken = 0
        for handle, prompt in enumerate(prompts, 1):
            needed = watched.cache.layout.blocks_for(len(prompt) + new_tokens)
            self._all.append(_Progress(handle, prompt, tuple(range(taken, taken + needed))))
            taken += needed

    def run(self) -> list[Continuation]:
        starts = tuple(self._start(one) for one in self._all)
        while running := [one for one in self._all if len(one.tokens) < self._new_tokens]:
            self._step(running, starts)
            starts = ()
        self._plans += 1
        self._watched.executor.execute(StepPlan(number=self._plans, rows=(), ends=tuple(one.handle for one in self._all)))
        return [Continuation(tokens=tuple(one.tokens), bits=tuple(one.digests)) for one in self._all]

    def _step(self, running: Sequence[_Progress], starts: tuple[SequenceStart, ...]) -> None:
        rows = tuple(self._row(one) for one in running)
        self._plans += 1
        results = self._watched.executor.execute(StepPlan(number=self._plans, rows=rows, starts=starts)).rows
        digests = iter(self._watched.forward.take())
        for one, row, result in zip(running, rows, results, strict=True):
            if result.fault is not None:
                raise SegueError(f"a step failed: {result.fault}")
            one.computed += row.count
            if result.token is not None:
                one.tokens.append(result.token)
                one.digests.append(next(digests))

    def _row(self, one: _Progress) -> StepRow:
        left = len(one.prompt) + len(one.tokens) - one.computed
        count = left if self._chunk is None else min(left, self._chunk)
        return StepRow(handle=one.handle, start=one.computed, count=count, blocks=one.blocks, sample=count == left)

    def _start(self, one: _Progress) -> SequenceStart:
        return SequenceStart(
            handle=one.handle,
            choice=0,
            prompt_length=len(one.prompt),
            tokens=tuple(one.prompt),
            sampling=greedy(self._new_tokens),
            eos_token_ids=(),
        )
