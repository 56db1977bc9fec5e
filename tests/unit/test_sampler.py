"""Drawing tokens from logits: order of processing, greedy ties, seeds, independence of neighbours, log-probabilities."""

import math
from typing import Any

import pytest
import torch

from common.engine.native.cpu_variant import VARIANTS, CpuVariant
from common.engine.native.native_sampler import NativeSampler
from common.engine.sampler import Drawn, Sampler
from common.engine.sequence_state import SequenceState
from common.engine.torch_sampler import TorchSampler
from common.values.sampling import SamplingParameters
from common.values.step import SequenceStart
from tests.native_kernels import library_of

VOCABULARY = 1000
EOS = 7


@pytest.fixture(scope="module", params=[None, *VARIANTS], ids=lambda variant: "torch" if variant is None else variant.name)
def sampler(request: pytest.FixtureRequest) -> Sampler:
    variant: CpuVariant | None = request.param
    return TorchSampler() if variant is None else NativeSampler(library_of(variant))


def state(prompt: tuple[int, ...] = (1, 2, 3), output: tuple[int, ...] = (), *, choice: int = 0, **sampling: Any) -> SequenceState:
    parameters = SamplingParameters(**{"max_tokens": 100, "seed": 11, **sampling})
    start = SequenceStart(
        handle=0, choice=choice, prompt_length=len(prompt), tokens=prompt + output, sampling=parameters, eos_token_ids=(EOS,)
    )
    return SequenceState(start)


def random_logits(rows: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * spread


def draw_one(sampler: Sampler, row: torch.Tensor, of: SequenceState) -> Drawn:
    return sampler.draw(row[None].clone(), [of])[0]


def test_greedy_takes_the_lowest_id_of_equal_logits(sampler: Sampler) -> None:
    row = torch.zeros(VOCABULARY)
    row[[40, 12, 900]] = 5.0
    assert draw_one(sampler, row, state(temperature=0.0)).token == 12


def test_a_draw_does_not_depend_on_its_neighbours_or_on_their_number(sampler: Sampler) -> None:
    logits = random_logits(12)
    states = [
        state(seed=i, temperature=0.0 if i % 4 == 0 else 0.9, top_p=(1.0, 0.8)[i % 2], top_k=(0, 40, 300)[i % 3]) for i in range(12)
    ]
    together = [drawn.token for drawn in sampler.draw(logits.clone(), states)]
    alone = [draw_one(sampler, row, one).token for row, one in zip(logits, states, strict=True)]
    backwards = [drawn.token for drawn in sampler.draw(logits.flip(0), states[::-1])][::-1]
    assert together == alone == backwards


def test_seed_choice_and_position_each_change_the_draws(sampler: Sampler) -> None:
    rows = random_logits(40, spread=1.0)

    def tokens(**changes: Any) -> list[int]:
        return [draw_one(sampler, row, state(**changes)).token for row in rows]

    assert tokens() == tokens()
    assert len({tuple(tokens()), tuple(tokens(seed=12)), tuple(tokens(choice=1)), tuple(tokens(output=(5,)))}) == 4


def test_draws_follow_the_distribution(sampler: Sampler) -> None:
    """At temperature 2 over ten tokens: chi-square, 9 degrees of freedom; 33.7 is exceeded once in 10,000 samples."""
    logits = torch.linspace(0, 3, 10)
    probabilities = torch.softmax(logits / 2, dim=-1).tolist()
    draws = 4000
    states = [state(seed=seed, temperature=2.0) for seed in range(draws)]
    counts = [0] * 10
    for drawn in sampler.draw(logits.repeat(draws, 1), states):
        counts[drawn.token] += 1
    chi_square = sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in enumerate(probabilities))
    assert chi_square < 33.7


@pytest.mark.parametrize("spread", [0.001, 0.3, 3.0])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 400}, {"top_p": 0.98}, {"min_p": 0.01}, {"top_k": 300, "top_p": 0.9}])
def test_flat_rows_fall_back_to_all_tokens_and_follow_the_distribution(
    sampler: Sampler, spread: float, truncation: dict[str, Any]
) -> None:
    """Among 1,000 tokens 256 candidates do not suffice here; the upper half of what is kept must get its share."""
    row = random_logits(1, seed=3, spread=spread)[0]
    draws = 600
    drawn = sampler.draw(row.repeat(draws, 1), [state(seed=seed, temperature=1.0, **truncation) for seed in range(draws)])
    best = set(torch.topk(row, 100).indices.tolist())
    weights = torch.softmax(row.double(), dim=-1)
    weights, order = torch.sort(weights, descending=True)
    kept = weights[: truncation.get("top_k", VOCABULARY)]
    kept = kept / kept.sum()
    kept = kept[(kept.cumsum(0) - kept < truncation.get("top_p", 1.0)) & (kept >= kept[0] * truncation.get("min_p", 0.0))]
    share = float(kept[:100].sum() / kept.sum())
    allowed = set(order[: len(kept)].tolist())
    assert {one.token for one in drawn} <= allowed
    hits = sum(1 for one in drawn if one.token in best)
    assert abs(hits - draws * share) <= 4.5 * math.sqrt(draws * share * (1 - share)) + 1e-9


def test_penalties_and_bias_are_those_of_the_definition(sampler: Sampler) -> None:
    row = random_logits(1, seed=5)[0]
    one = state((1, 2, 2, 3), (2, 9, 9), repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2,
                logit_bias={2: 1.5, 500: -3.0}, temperature=0.0, logprobs=20)  # fmt: skip
    expected = row.tolist()
    expected[2] += 1.5
    expected[500] -= 3.0
    for token in {1, 2, 3, 9}:
        expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
    for token, often in {2: 1, 9: 2}.items():
        expected[token] -= 0.2 * often + 0.4
    drawn = draw_one(sampler, row, one)
    assert drawn.token == max(range(VOCABULARY), key=lambda token: expected[token])
    logprobs = torch.log_softmax(torch.tensor(expected), dim=-1)
    assert drawn.logprobs is not None
    assert drawn.logprobs.logprob == pytest.approx(float(logprobs[drawn.token]), abs=1e-5)
    for token, value in drawn.logprobs.top:
        assert value == pytest.approx(float(logprobs[token]), abs=1e-5)


def test_penalties_grow_with_the_sequence_as_if_built_anew(sampler: Sampler) -> None:
    grown = state((1, 2), (), repetition_penalty=1.2, frequency_penalty=0.5, temperature=0.0)
    for token in range(600):
        draw_one(sampler, random_logits(1)[0], grown)
        grown.append((token * 37) % 400)
    anew = state((1, 2), tuple(grown.tokens[2:]), repetition_penalty=1.2, frequency_penalty=0.5, temperature=0.0)
    for counts in (grown.counts, anew.counts):
        assert sorted(counts.tokens.tolist()) == sorted(set(grown.tokens))
    assert dict(zip(grown.counts.tokens.tolist(), grown.counts.output_counts.tolist(), strict=True)) == dict(
        zip(anew.counts.tokens.tolist(), anew.counts.output_counts.tolist(), strict=True)
    )


def test_ends_are_masked_until_min_tokens(sampler: Sampler) -> None:
    row = torch.zeros(VOCABULARY)
    row[EOS], row[8], row[9] = 30.0, 20.0, 10.0
    waiting: dict[str, Any] = {"min_tokens": 2, "stop_token_ids": (8, VOCABULARY + 5), "temperature": 0.0}
    assert draw_one(sampler, row, state(output=(), **waiting)).token == 9
    assert draw_one(sampler, row, state(output=(4,), **waiting)).token == 9
    assert draw_one(sampler, row, state(output=(4, 4), **waiting)).token == EOS


def test_logprobs_come_before_temperature_and_rank_ties_by_id(sampler: Sampler) -> None:
    row = torch.zeros(VOCABULARY)
    row[[10, 20, 30]] = 4.0
    drawn = draw_one(sampler, row, state(temperature=0.5, top_k=3, seed=1, logprobs=5))
    assert drawn.logprobs is not None
    assert drawn.logprobs.logprob == pytest.approx(float(torch.log_softmax(row, -1)[10]), abs=1e-6)
    assert drawn.logprobs.rank == {10: 1, 20: 2, 30: 3}[drawn.token]
    assert [token for token, _ in drawn.logprobs.top] == [10, 20, 30, 0, 1]
    assert draw_one(sampler, row, state(logprobs=None)).logprobs is None
    none_beside = draw_one(sampler, row, state(logprobs=0)).logprobs
    assert none_beside is not None
    assert none_beside.top == ()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_row_faults_alone(sampler: Sampler, value: float, temperature: float) -> None:
    logits = random_logits(3)
    states = [state(seed=i, temperature=temperature) for i in range(3)]
    healthy = [drawn.token for drawn in sampler.draw(logits.clone(), states)]
    logits[1, 17] = value
    drawn = sampler.draw(logits, states)
    assert drawn[1].fault is not None
    assert [drawn[0].token, drawn[2].token] == [healthy[0], healthy[2]]


def test_nothing_left_to_draw_is_a_fault(sampler: Sampler) -> None:
    row = torch.zeros(2)
    drawn = sampler.draw(row[None], [state(min_tokens=1, stop_token_ids=(0, 1), temperature=0.0)])[0]
    assert drawn.fault is not None


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 100.0])
def test_extreme_temperatures_draw_something_sound(sampler: Sampler, temperature: float) -> None:
    row = random_logits(1, seed=9)[0]
    token = draw_one(sampler, row, state(temperature=temperature)).token
    assert temperature > 1 or token == int(row.argmax())


@pytest.mark.parametrize("spread", [0.05, 1.0, 4.0])
def test_looking_at_few_candidates_first_never_changes_a_token(sampler: Sampler, spread: float) -> None:
    """Logits on a coarse grid, so that many are equal, as bfloat16 makes them; 6,000 tokens: every stage is reached."""
    generator = torch.Generator().manual_seed(4)
    logits = (torch.randn(24, 6000, generator=generator) * spread * 16).round() / 16
    options: list[dict[str, Any]] = [
        {},
        {"top_k": 30},
        {"top_k": 5000},
        {"top_p": 0.7},
        {"min_p": 0.05},
        {"top_k": 900, "top_p": 0.99},
    ]
    states = [state(seed=number, **options[number % len(options)]) for number in range(24)]
    short = [drawn.token for drawn in sampler.draw(logits.clone(), states)]
    assert [drawn.token for drawn in TorchSampler(candidates=6000).draw(logits.clone(), states)] == short
