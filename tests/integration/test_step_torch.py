"""The torch executor on a tiny random Llama, in float32: chunks, batches, moved caches, faults, log-probabilities."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.engine import paged_batch, torch_step
from common.engine.executor import Executor
from common.engine.paged_attention import PAGED_ATTENTION
from common.values.step import SequenceStart, StepRow
from tests.step_engines import Memory, chunk, generate, prompt_of, run, started, tiny_llama, token_of, torch_executor


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_llama()


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def executor(model: torch.nn.Module, memory: Memory) -> Executor:
    return torch_executor(model, memory)


def reference(model: torch.nn.Module, prompt: Sequence[int], count: int) -> list[int]:
    """transformers' own greedy generation, with its own attention and cache."""
    model.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        output = model.generate(  # type: ignore[operator]
            torch.tensor([list(prompt)]), max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None
        )
    finally:
        model.set_attn_implementation(PAGED_ATTENTION)  # type: ignore[operator]
    return [int(token) for token in output[0, len(prompt) :]]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 31, 32, 33, 150])
def test_greedy_tokens_are_those_of_transformers(executor: Executor, model: torch.nn.Module, length: int) -> None:
    prompt = prompt_of(length)
    blocks = list(range(60, 5, -1))
    assert generate(executor, started(1, prompt), blocks, 40) == reference(model, prompt, 40)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 69), max_size=6, unique=True))
def test_chunks_of_any_length_give_the_tokens_of_the_whole(executor: Executor, cuts: list[int]) -> None:
    prompt = prompt_of(70)
    whole = generate(executor, started(1, prompt), range(30), 8)
    ends = sorted(cuts)
    lengths = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    assert generate(executor, started(2, prompt), range(100, 130), 8, chunks=lengths) == whole


@pytest.mark.parametrize("sampled", [False, True])
def test_sequences_that_come_and_go_beside_each_other_get_the_tokens_they_get_alone(executor: Executor, sampled: bool) -> None:
    """Chunks and decode rows of seven sequences mixed, each step with others; then each alone."""

    def start(number: int, handle: int) -> SequenceStart:
        options: dict[str, Any] = {"temperature": 1.1, "top_p": 0.9, "repetition_penalty": 1.1, "seed": number} if sampled else {}
        return started(handle, prompt_of(3 + 9 * number, number), choice=number % 2, **options)

    alone = [generate(executor, start(number, 50), range(30), 9) for number in range(7)]
    tokens: list[list[int]] = [[] for _ in range(7)]
    done = [0] * 7
    began: set[int] = set()
    for turn in range(40):
        rows: list[StepRow] = []
        for number in range(7):
            length = 3 + 9 * number
            if turn < 2 * number or len(tokens[number]) == 9:
                continue
            count = min(11, length - done[number]) if done[number] < length else 1
            last = done[number] + count >= length
            blocks = [number + 7 * block for block in range(22)]
            rows.append(chunk(number, done[number], count, blocks, sample=last))
        order = rows if turn % 2 else rows[::-1]
        starts = [start(row.handle, row.handle) for row in order if row.handle not in began]
        began.update(row.handle for row in order)
        for row, result in zip(order, run(executor, *order, starts=starts), strict=True):
            done[row.handle] += row.count
            if row.sample:
                tokens[row.handle].append(token_of(result))
    assert tokens == alone


def test_a_cache_copied_to_another_region_decodes_to_the_same_tokens(model: torch.nn.Module) -> None:
    source, target = Memory(), Memory()
    prefill, decode = torch_executor(model, source), torch_executor(model, target)
    prompt = prompt_of(30)
    whole = generate(prefill, started(1, prompt), range(20), 20)
    (result,) = run(prefill, chunk(2, 0, 30, range(20, 28)), starts=[started(2, prompt)])
    first = token_of(result)
    for place, block in enumerate(range(20, 28)):
        source.copy_block(block, target, 50 - place)
    table = [50 - place for place in range(8)] + list(range(60, 80))
    tokens = [first]
    starts = [started(9, [*prompt, first], prompt_length=30)]
    for place in range(30, 49):
        tokens.append(token_of(run(decode, chunk(9, place, 1, table), starts=starts)[0]))
        starts = []
    assert tokens == whole


def test_a_shared_prefix_is_read_and_not_written(executor: Executor, memory: Memory) -> None:
    prompt = prompt_of(30)
    whole = generate(executor, started(1, prompt), range(20), 6)
    before = [memory.block(number) for number in range(5)]
    shared = [*range(5), *range(100, 115)]
    assert generate(executor, started(2, prompt, seed=8), shared, 6, chunks=[]) == whole
    (result,) = run(executor, chunk(3, 20, 10, shared), starts=[started(3, prompt)])
    assert token_of(result) == whole[0]
    assert [memory.block(number) for number in range(5)] == before


def test_the_unused_tail_of_a_begun_block_is_zero(executor: Executor, memory: Memory) -> None:
    generate(executor, started(1, prompt_of(6)), [0, 1, 2], 1)
    view = torch.frombuffer(memory.bytes_, dtype=torch.float32).view(memory.blocks, 3, 2, 2, 4, 16)
    assert not view[1, :, :, :, 2:].any()
    assert view[1, :, :, :, :2].isfinite().all()
    assert view[2].isnan().all(), "a block that was not begun is left alone"


def test_not_a_number_in_one_cache_is_the_fault_of_one_row(executor: Executor, memory: Memory) -> None:
    alone = generate(executor, started(9, prompt_of(12)), range(100, 110), 2)
    starts = [started(handle, prompt_of(12)) for handle in (1, 2)]
    run(executor, chunk(1, 0, 11, range(4), sample=False), chunk(2, 0, 11, range(4, 8), sample=False), starts=starts)
    torch.frombuffer(memory.bytes_, dtype=torch.float32).view(memory.blocks, -1)[5].fill_(float("nan"))
    good, bad = run(executor, chunk(1, 11, 1, range(4)), chunk(2, 11, 1, range(4, 8)))
    assert token_of(good) == alone[0]
    assert bad.fault is not None
    good, bad = run(executor, chunk(1, 12, 1, range(4)), chunk(2, 12, 1, range(4, 8)))
    assert token_of(good) == alone[1]
    assert bad.fault is not None


class Fragile(torch.nn.Module):
    """Wraps a model's first layer; raises where the poisonous token comes in."""

    def __init__(self, embedding: torch.nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding
        self.num_embeddings = embedding.num_embeddings

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if bool((tokens == 299).any()):
            raise RuntimeError("a kernel refused this input")
        result = self.embedding(tokens)
        assert isinstance(result, torch.Tensor)
        return result


def test_an_exception_in_the_forward_is_the_fault_of_the_row_that_causes_it(memory: Memory) -> None:
    model = tiny_llama()
    model.set_input_embeddings(Fragile(model.get_input_embeddings()))  # type: ignore[operator]
    executor = torch_executor(model, memory)
    prompts = [[token % 299 for token in prompt_of(length)] for length in (5, 9, 13)]
    alone = [generate(executor, started(9, prompt), range(8), 2) for prompt in prompts]
    prompts[1][4] = 299
    rows = [chunk(number, 0, len(prompt), range(8 * number, 8 * number + 8)) for number, prompt in enumerate(prompts)]
    results = run(executor, *rows, starts=[started(number, prompt) for number, prompt in enumerate(prompts)])
    assert "refused" in (results[1].fault or "")
    assert [token_of(results[0]), token_of(results[2])] == [alone[0][0], alone[2][0]]
    rows = [chunk(number, len(prompts[number]), 1, range(8 * number, 8 * number + 8)) for number in (0, 1, 2)]
    results = run(executor, *rows)
    assert results[1].fault is not None
    assert [token_of(results[0]), token_of(results[2])] == [alone[0][1], alone[2][1]]


@pytest.mark.parametrize("slice_positions", [7, 256])
def test_prompt_log_probabilities_are_those_of_the_model(
    executor: Executor, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, slice_positions: int
) -> None:
    monkeypatch.setattr(torch_step, "SLICE_POSITIONS", slice_positions)
    prompt = prompt_of(40)
    (result,) = run(
        executor,
        chunk(1, 0, 40, range(12), scores=True),
        starts=[started(1, prompt, prompt_logprobs=4, logprobs=1, repetition_penalty=1.5)],
    )
    model.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(torch.tensor([prompt]), use_cache=False).logits[0], dim=-1)
    model.set_attn_implementation(PAGED_ATTENTION)  # type: ignore[operator]
    assert len(result.prompt_logprobs) == 39
    for place, scores in enumerate(result.prompt_logprobs):
        row = logprobs[place]
        assert scores.logprob == pytest.approx(float(row[prompt[place + 1]]), abs=1e-4)
        assert [token for token, _ in scores.top] == torch.topk(row, 4).indices.tolist()
        assert scores.rank == 1 + int((row > row[prompt[place + 1]]).sum())


def test_groups_that_would_gather_too_much_are_split(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = [started(number, prompt_of(6, number)) for number in range(5)]
    tables = [range(4 * number, 4 * number + 4) for number in range(5)]

    def two_steps() -> list[int | None]:
        run(executor, *(chunk(number, 0, 6, tables[number]) for number in range(5)), starts=starts)
        results = run(executor, *(chunk(number, 6, 1, tables[number]) for number in range(5)))
        run(executor, ends=range(5))
        return [token_of(result) for result in results]

    together = two_steps()
    monkeypatch.setattr(paged_batch, "GATHER_BYTES", 1)
    assert two_steps() == together
