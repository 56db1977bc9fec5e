"""The laws of every step engine, through StepThread: the synthetic executor and torch with a tiny Llama."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

import pytest

from common.engine.executor import Executor
from common.engine.step_thread import StepThread
from common.engine.synthetic import SyntheticExecutor
from common.values.errors import InvariantBroken
from common.values.step import RowResult, SequenceStart, StepPlan, StepResult, StepRow
from tests.step_engines import VOCABULARY, Memory, chunk, prompt_of, started, tiny_llama, token_of, torch_executor

MEMORY = Memory()


@pytest.fixture(params=["synthetic", "torch"])
def executor(request: pytest.FixtureRequest) -> Executor:
    if request.param == "synthetic":
        return SyntheticExecutor(vocab_size=VOCABULARY)
    return torch_executor(tiny_llama(), MEMORY)


@contextlib.asynccontextmanager
async def running(executor: Executor) -> AsyncIterator[StepThread]:
    engine = StepThread(executor)
    try:
        yield engine
    finally:
        await engine.close()


def plan(number: int, *rows: StepRow, starts: tuple[SequenceStart, ...] = (), ends: tuple[int, ...] = ()) -> StepPlan:
    return StepPlan(number=number, rows=rows, starts=starts, ends=ends)


async def step(engine: StepThread, *rows: StepRow, starts: tuple[SequenceStart, ...] = ()) -> tuple[RowResult, ...]:
    return (await engine.result(engine.submit(plan(0, *rows, starts=starts)))).rows


async def one_by_one(engine: StepThread, handle: int, prompt: list[int], count: int, blocks: range) -> list[int]:
    (first,) = await step(engine, chunk(handle, 0, len(prompt), blocks), starts=(started(handle, prompt),))
    places = range(len(prompt), len(prompt) + count - 1)
    following = [(await step(engine, chunk(handle, place, 1, blocks)))[0] for place in places]
    return [token_of(result) for result in (first, *following)]


async def test_a_plan_may_go_in_before_the_result_before_it_is_read(executor: Executor) -> None:
    prompt = prompt_of(9)
    async with running(executor) as engine:
        expected = await one_by_one(engine, 1, prompt, 12, range(8))
        tokens = []
        ticket = engine.submit(plan(7, chunk(2, 0, 9, range(8, 16)), starts=(started(2, prompt),)))
        for place in range(9, 20):
            following = engine.submit(plan(place, chunk(2, place, 1, range(8, 16))))
            result = await engine.result(ticket)
            assert result.number == (7 if place == 9 else place - 1)
            tokens.append(token_of(result.rows[0]))
            ticket = following
        tokens.append(token_of((await engine.result(ticket)).rows[0]))
    assert tokens == expected


async def test_results_come_in_the_order_of_the_rows_whatever_their_kind(executor: Executor) -> None:
    async with running(executor) as engine:
        alone = {length: (await one_by_one(engine, length, prompt_of(length), 3, range(12))) for length in (1, 5, 13, 30)}
        await step(
            engine,
            chunk(105, 0, 5, range(40, 52)),
            chunk(100, 0, 1, range(20, 32)),
            starts=(started(100, prompt_of(1)), started(105, prompt_of(5))),
        )
        results = await step(
            engine,
            chunk(130, 0, 30, range(60, 72)),
            chunk(100, 1, 1, range(20, 32)),
            chunk(113, 0, 8, range(80, 92), sample=False),
            chunk(105, 5, 1, range(40, 52)),
            starts=(started(130, prompt_of(30)), started(113, prompt_of(13))),
        )
    assert [result.handle for result in results] == [130, 100, 113, 105]
    assert [result.token for result in results] == [alone[30][0], alone[1][1], None, alone[5][1]]


async def test_a_sequence_may_begin_with_new_tokens_that_exist_already(executor: Executor) -> None:
    prompt = prompt_of(11)
    async with running(executor) as engine:
        tokens = await one_by_one(engine, 1, prompt, 10, range(8))
        (result,) = await step(
            engine,
            chunk(2, 0, 17, range(8, 16)),
            starts=(started(2, [*prompt, *tokens[:6]], prompt_length=11),),
        )
    assert token_of(result) == tokens[6]


@pytest.mark.parametrize(
    ("tokens", "row"),
    [
        ([5, 6, VOCABULARY], chunk(1, 0, 3, [0])),
        ([5, 6, -1], chunk(1, 0, 3, [0])),
        ([5, 6, 7], chunk(1, 0, 4, [0, 1])),
        ([5, 6, 7], chunk(1, 0, 2, [0])),
        ([5, 6, 7], chunk(1, 0, 0, [0], sample=False)),
        ([5, 6, 7], chunk(1, -1, 2, [0], sample=False)),
        ([5, 6, 7], chunk(99, 0, 3, [0])),
    ],
)
async def test_what_cannot_be_computed_is_the_fault_of_its_row_alone(executor: Executor, tokens: list[int], row: StepRow) -> None:
    async with running(executor) as engine:
        good = await one_by_one(engine, 5, prompt_of(6), 2, range(4, 8))
        bad, other = await step(engine, row, chunk(2, 0, 6, range(8, 12)), starts=(started(1, tokens), started(2, prompt_of(6))))
        assert bad.fault is not None
        assert bad.token is None
        assert token_of(other) == good[0]
        again, other = await step(engine, row, chunk(2, 6, 1, range(8, 12)))
        assert again.fault == bad.fault
        assert token_of(other) == good[1]


async def test_a_handle_is_free_again_after_its_end(executor: Executor) -> None:
    async with running(executor) as engine:
        first = await one_by_one(engine, 1, prompt_of(6), 1, range(4))
        await engine.result(engine.submit(plan(1, ends=(1, 77))))
        assert (await step(engine, chunk(1, 6, 1, range(4))))[0].fault is not None
        assert await one_by_one(engine, 1, prompt_of(6), 1, range(4)) == first


async def test_prompt_log_probabilities_cover_the_prompt_after_its_first_token(executor: Executor) -> None:
    prompt = prompt_of(10)
    start = started(1, prompt, logprobs=3, prompt_logprobs=2)
    async with running(executor) as engine:
        first = await step(engine, chunk(1, 0, 6, range(4), sample=False, scores=True), starts=(start,))
        second = await step(engine, chunk(1, 6, 4, range(4), scores=True))
        whole = await step(engine, chunk(2, 0, 10, range(4, 8), scores=True), starts=(started(2, prompt, prompt_logprobs=2),))
    assert (len(first[0].prompt_logprobs), len(second[0].prompt_logprobs)) == (6, 3)
    assert all(len(scores.top) == 2 and scores.logprob <= 0 for scores in whole[0].prompt_logprobs)
    together = first[0].prompt_logprobs + second[0].prompt_logprobs
    assert [scores.rank for scores in together] == [scores.rank for scores in whole[0].prompt_logprobs]
    assert second[0].logprobs is not None
    assert len(second[0].logprobs.top) == 3
    assert second[0].token == whole[0].token


async def test_at_most_two_plans_are_outstanding(executor: Executor) -> None:
    async with running(executor) as engine:
        first = engine.submit(plan(1))
        second = engine.submit(plan(2))
        with pytest.raises(InvariantBroken, match="outstanding"):
            engine.submit(plan(3))
        assert (await engine.result(first)).number == 1
        third = engine.submit(plan(3))
        assert [(await engine.result(ticket)).number for ticket in (second, third)] == [2, 3]
        with pytest.raises(InvariantBroken, match="ticket"):
            await engine.result(first)


class Gated:
    """An executor that stops at a gate, so that a test can act while a step computes."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.gate = threading.Event()
        self.threads: set[int] = set()

    def prepare_thread(self, threads: int) -> None:
        self.threads.add(threading.get_ident())

    def execute(self, plan: StepPlan) -> StepResult:
        self.threads.add(threading.get_ident())
        self.began.set()
        self.gate.wait()
        if plan.number < 0:
            raise MemoryError("the accelerator caught fire")
        return StepResult(number=plan.number, rows=(), duration_s=0.0)


async def test_a_cancelled_wait_loses_no_result() -> None:
    gated = Gated()
    async with running(gated) as engine:
        ticket = engine.submit(plan(4))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.result(ticket), 0.01)
        gated.gate.set()
        assert (await engine.result(ticket)).number == 4
    assert len(gated.threads) == 1
    assert threading.get_ident() not in gated.threads


async def test_a_crash_surfaces_from_every_result_and_from_submit() -> None:
    gated = Gated()
    async with running(gated) as engine:
        tickets = [engine.submit(plan(-1)), engine.submit(plan(2))]
        gated.gate.set()
        for ticket in tickets:
            with pytest.raises(InvariantBroken, match="caught fire"):
                await engine.result(ticket)
        with pytest.raises(InvariantBroken, match="caught fire"):
            engine.submit(plan(3))


async def test_close_finishes_the_step_that_computes_and_drops_the_next() -> None:
    gated = Gated()
    engine = StepThread(gated)
    computing, queued = engine.submit(plan(1)), engine.submit(plan(2))
    await asyncio.to_thread(gated.began.wait)
    closing = asyncio.create_task(engine.close())
    await asyncio.sleep(0)
    gated.gate.set()
    await closing
    await engine.close()
    assert (await engine.result(computing)).number == 1
    with pytest.raises(InvariantBroken, match="closed"):
        await engine.result(queued)
    with pytest.raises(InvariantBroken, match="closed"):
        engine.submit(plan(3))
