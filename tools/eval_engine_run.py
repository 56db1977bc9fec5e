"""What one forward answers: the scores of the fixed text, and greedy continuations, by the plans that a worker would give it."""

from collections.abc import Sequence
from dataclasses import dataclass

from common.values.errors import SegueError
from common.values.sampling import SamplingParameters
from common.values.step import RowResult, SequenceStart, StepPlan, StepRow
from common.values.tokens import PositionLogprobs
from tools.engine_variants import LoadedVariant
from tools.eval_engine_material import Material

_ALTERNATIVES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """New tokens, and at each of them the best alternatives with their log-probabilities, best first."""

    tokens: tuple[int, ...]
    tops: tuple[tuple[tuple[int, float], ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """`scores` are of the text's tokens after the first."""

    scores: tuple[PositionLogprobs, ...]
    continuations: tuple[Continuation, ...]


def answer(loaded: LoadedVariant, material: Material, *, new_tokens: int, batch: int) -> Answers:
    runner = _Runner(loaded)
    scores = runner.score(material.text)
    made: list[Continuation] = []
    for first in range(0, len(material.prompts), batch):
        made += runner.continue_together(material.prompts[first : first + batch], new_tokens)
    return Answers(scores=scores, continuations=tuple(made))


class _Runner:
    def __init__(self, loaded: LoadedVariant) -> None:
        self._executor = loaded.executor
        self._layout = loaded.pool.layout
        self._plans = 0

    def score(self, text: Sequence[int]) -> tuple[PositionLogprobs, ...]:
        blocks = tuple(range(self._layout.blocks_for(len(text))))
        row = StepRow(handle=1, start=0, count=len(text), blocks=blocks, sample=False, prompt_logprobs=True)
        (result,) = self._run((row,), (_start(1, text),))
        self._run((), ends=(1,))
        return result.prompt_logprobs

    def continue_together(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Continuation]:
        """All prompts in one step, then one token of each a step."""
        handles = range(1, len(prompts) + 1)
        each = self._layout.blocks_for(max(map(len, prompts)) + new_tokens)
        tables = [tuple(range(number * each, (number + 1) * each)) for number in range(len(prompts))]
        starts = tuple(_start(handle, prompt) for handle, prompt in zip(handles, prompts, strict=True))
        results: list[list[RowResult]] = [[] for _ in prompts]
        for step in range(new_tokens):
            rows = tuple(
                StepRow(handle=handle, start=0, count=len(prompt), blocks=table, sample=True)
                if step == 0
                else StepRow(handle=handle, start=len(prompt) + step - 1, count=1, blocks=table, sample=True)
                for handle, prompt, table in zip(handles, prompts, tables, strict=True)
            )
            for mine, result in zip(results, self._run(rows, starts if step == 0 else ()), strict=True):
                mine.append(result)
        self._run((), ends=tuple(handles))
        return [_continuation(mine) for mine in results]

    def _run(
        self, rows: tuple[StepRow, ...], starts: tuple[SequenceStart, ...] = (), ends: tuple[int, ...] = ()
    ) -> tuple[RowResult, ...]:
        self._plans += 1
        results = self._executor.execute(StepPlan(number=self._plans, rows=rows, starts=starts, ends=ends)).rows
        if faults := [result.fault for result in results if result.fault is not None]:
            raise SegueError(f"a step failed: {faults[0]}")
        return results


def _start(handle: int, tokens: Sequence[int]) -> SequenceStart:
    sampling = SamplingParameters(
        max_tokens=4096, seed=0, temperature=0.0, ignore_eos=True, logprobs=_ALTERNATIVES, prompt_logprobs=_ALTERNATIVES
    )
    return SequenceStart(handle=handle, choice=0, prompt_length=len(tokens), tokens=tuple(tokens), sampling=sampling, eos_token_ids=())


def _continuation(results: Sequence[RowResult]) -> Continuation:
    tokens = tuple(result.token for result in results if result.token is not None)
    tops = tuple(() if result.logprobs is None else result.logprobs.top for result in results)
    return Continuation(tokens=tokens, tops=tops)
