"""The kernels draw the tokens of torch's sampler, whatever is asked; and a row's token and log-probabilities have the same bits alone
as in any batch and with any threads."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.engine.native.cpu_variant import VARIANTS
from common.engine.native.library import NativeLibrary
from common.engine.native.native_sampler import NativeSampler
from common.engine.sampler import Drawn, Sampler
from common.engine.sequence_state import SequenceState
from common.engine.torch_sampler import TorchSampler
from common.values.sampling import SamplingParameters
from common.values.step import SequenceStart
from tests.native_kernels import library_of


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.name)
def library(request: pytest.FixtureRequest) -> NativeLibrary:
    return library_of(request.param)


class RandomMask:
    """Allows about a share of the tokens, others at each place."""

    def __init__(self, vocabulary: int, share: float, seed: int) -> None:
        self._vocabulary, self._share, self._seed, self._place = vocabulary, share, seed, 0

    def allowed(self) -> NDArray[np.int32] | None:
        random = np.random.default_rng((self._seed, self._place))
        bits = random.random(-(-self._vocabulary // 32) * 32) < self._share
        return np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token: int) -> None:
        self._place += 1


def states_of(asked: Sequence[dict[str, Any]], vocabulary: int) -> list[SequenceState]:
    states = []
    for handle, one in enumerate(asked):
        tokens = tuple(int(t) % vocabulary for t in one["tokens"])
        sampling = SamplingParameters(max_tokens=100, seed=one["seed"], **one["sampling"])
        start = SequenceStart(
            handle=handle, choice=handle % 3, prompt_length=1, tokens=(0, *tokens), sampling=sampling, eos_token_ids=(1,)
        )
        states.append(SequenceState(start))
        if one["share"] is not None:
            states[-1].mask = RandomMask(vocabulary, one["share"], one["seed"])
    return states


def logits_of(kind: str, rows: int, vocabulary: int, seed: int) -> torch.Tensor:
    noise = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))
    match kind:
        case "peaked":
            return noise.pow(3) * 2
        case "ties":
            return (noise * 8).round() / 4
        case "flat":
            return noise * 0.01
        case "equal":
            return torch.zeros_like(noise)
        case "huge":
            return noise * 1e37
        case _:
            return noise * 3


samplings = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-6, 0.3, 1.0, 1.0, 1.7, 30.0]),
        "top_p": st.just(1.0) | st.floats(0.001, 1.0),
        "top_k": st.just(0) | st.integers(1, 60) | st.integers(1, 4000),
        "min_p": st.just(0.0) | st.floats(0.0, 1.0),
        "repetition_penalty": st.just(1.0) | st.floats(0.3, 3.0),
        "presence_penalty": st.just(0.0) | st.floats(-2.0, 2.0),
        "frequency_penalty": st.just(0.0) | st.floats(-2.0, 2.0),
        "min_tokens": st.integers(0, 5),
        "logit_bias": st.just({}) | st.dictionaries(st.integers(0, 1), st.floats(-100.0, 100.0), max_size=2),
        "logprobs": st.none() | st.integers(0, 20),
    }
)
asked_rows = st.lists(
    st.fixed_dictionaries(
        {
            "sampling": samplings,
            "seed": st.integers(0, 2**63 - 1),
            "tokens": st.lists(st.integers(0, 5000), max_size=8),
            "share": st.none() | st.sampled_from([0.0, 0.01, 0.5, 1.0]),
        }
    ),
    min_size=1,
    max_size=6,
)
kinds = st.sampled_from(["normal", "peaked", "ties", "flat", "equal", "huge"])
vocabularies = st.sampled_from([2, 15, 64, 65, 300, 1000, 4099, 12288])


def drawn_by(sampler: Sampler, logits: torch.Tensor, states: Sequence[SequenceState]) -> list[Drawn]:
    return sampler.draw(logits.clone(), states)


@settings(max_examples=120, deadline=None)
@given(asked=asked_rows, kind=kinds, vocabulary=vocabularies, seed=st.integers(0, 1000))
def test_kernels_draw_what_torch_draws(
    library: NativeLibrary, asked: list[dict[str, Any]], kind: str, vocabulary: int, seed: int
) -> None:
    states = states_of(asked, vocabulary)
    logits = logits_of(kind, len(states), vocabulary, seed)
    assert drawn_by(NativeSampler(library), logits, states) == drawn_by(TorchSampler(), logits, states)


@settings(max_examples=40, deadline=None)
@given(asked=asked_rows, kind=kinds, vocabulary=vocabularies, seed=st.integers(0, 1000))
def test_a_row_has_the_same_bits_alone_and_with_any_threads(
    library: NativeLibrary, asked: list[dict[str, Any]], kind: str, vocabulary: int, seed: int
) -> None:
    states = states_of(asked, vocabulary)
    logits = logits_of(kind, len(states), vocabulary, seed)
    one, three = NativeSampler(library), NativeSampler(library)
    three.prepare_thread(3)
    together = drawn_by(one, logits, states)
    assert drawn_by(three, logits, states) == together
    assert [drawn_by(one, logits[i : i + 1], [state])[0] for i, state in enumerate(states)] == together


@settings(max_examples=40, deadline=None)
@given(kind=kinds, vocabulary=vocabularies, seed=st.integers(0, 1000), alternatives=st.integers(0, 20), rows=st.integers(1, 5))
def test_given_tokens_score_as_in_torch(
    library: NativeLibrary, kind: str, vocabulary: int, seed: int, alternatives: int, rows: int
) -> None:
    logits = logits_of(kind, rows, vocabulary, seed)
    tokens = [(seed * 7 + 13 * i) % vocabulary for i in range(rows)]
    native = NativeSampler(library).score(logits.clone(), tokens, alternatives)
    assert native == TorchSampler().score(logits, tokens, alternatives)
    assert native is not None
    exact = torch.log_softmax(logits.double(), dim=-1)
    for row, (token, found) in enumerate(zip(tokens, native, strict=True)):
        expected = float(exact[row, token])
        assert found.logprob == pytest.approx(expected, abs=1e-9, rel=1e-9)
        assert len(found.top) == min(alternatives, vocabulary)
    logits[rows - 1, 0] = float("nan")
    assert NativeSampler(library).score(logits, tokens, alternatives) is None
