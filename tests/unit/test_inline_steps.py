"""Steps on the loop itself: the same tokens as through a thread, in order, and others get their turn between two."""

import asyncio

import pytest

from common.engine.inline_steps import InlineSteps
from common.engine.step_thread import StepThread
from common.engine.synthetic import SyntheticExecutor
from common.ports.step_engine import StepEngine
from common.values.errors import InvariantBroken
from common.values.sampling import SamplingParameters
from common.values.step import SequenceStart, StepPlan, StepRow

PROMPT = (5, 6, 7)


def plan(number: int, start: int, count: int, *starts: SequenceStart) -> StepPlan:
    row = StepRow(handle=1, start=start, count=count, blocks=(), sample=True)
    return StepPlan(number=number, rows=(row,), starts=starts)


async def tokens(engine: StepEngine, count: int) -> list[int | None]:
    """Always with the next step submitted before a result is read."""
    sampling = SamplingParameters(max_tokens=50, seed=0)
    begun = SequenceStart(handle=1, choice=0, prompt_length=3, tokens=PROMPT, sampling=sampling, eos_token_ids=())
    tickets = [engine.submit(plan(0, 0, 3, begun))]
    made = []
    for number in range(1, count):
        tickets.append(engine.submit(plan(number, 2 + number, 1)))
        result = await engine.result(tickets[number - 1])
        assert result.number == number - 1
        made.append(result.rows[0].token)
    made.append((await engine.result(tickets[-1])).rows[0].token)
    await engine.close()
    return made


async def test_the_tokens_are_those_of_a_thread() -> None:
    inline = await tokens(InlineSteps(SyntheticExecutor(vocab_size=50)), 12)
    assert inline == await tokens(StepThread(SyntheticExecutor(vocab_size=50)), 12)


async def test_others_run_between_two_steps() -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(other())
    await tokens(InlineSteps(SyntheticExecutor(vocab_size=50)), 12)
    beside.cancel()
    assert turns >= 12


async def test_a_third_step_and_a_closed_engine_are_refused() -> None:
    engine = InlineSteps(SyntheticExecutor(vocab_size=50))
    first, _ = engine.submit(StepPlan(number=0, rows=())), engine.submit(StepPlan(number=1, rows=()))
    with pytest.raises(InvariantBroken, match="outstanding"):
        engine.submit(StepPlan(number=2, rows=()))
    await engine.result(first)
    with pytest.raises(InvariantBroken, match="no step"):
        await engine.result(first)
    await engine.close()
    with pytest.raises(InvariantBroken, match="closed"):
        engine.submit(StepPlan(number=3, rows=()))
