"""The seam for structured output: a sequence's grammar decides which tokens its steps may draw, through the whole executor."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from common.engine.executor import Executor
from common.engine.native.library import NativeLibrary
from common.engine.torch_step import build_torch_executor
from common.ports.grammar_mask import GrammarMask
from common.values.step import SequenceStart
from tests.native_kernels import best_library
from tests.step_engines import EOS, LAYOUT, VOCABULARY, Memory, chunk, generate, prompt_of, run, started, tiny_llama, token_of

DIGITS = tuple(range(20, 30))


class OnlyDigits:
    """Exactly `length` digits, then the end: a grammar as small as they come."""

    def __init__(self, length: int, words: int) -> None:
        self._left = length
        self._words = words

    def allowed(self) -> NDArray[np.int32] | None:
        bits = np.zeros(self._words * 32, dtype=np.bool_)
        bits[list(DIGITS if self._left else (EOS,))] = True
        return np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token: int) -> None:
        if token not in (DIGITS if self._left else (EOS,)):
            raise ValueError(f"{token} is not what this grammar takes")
        self._left -= 1


class DigitMasks:
    """Sequences whose prompt begins with 10 may say digits only; a prompt that begins with 11 asks for a grammar that is none, and
    12 gets a mask that is too short."""

    def __init__(self, length: int) -> None:
        self._length = length

    def mask(self, start: SequenceStart) -> GrammarMask | None:
        match start.tokens[0]:
            case 10:
                return OnlyDigits(self._length, -(-VOCABULARY // 32))
            case 11:
                raise ValueError("no such grammar")
            case 12:
                return OnlyDigits(self._length, 1)
            case _:
                return None


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture(params=["torch", "native"])
def executor(request: pytest.FixtureRequest, memory: Memory) -> Executor:
    library: NativeLibrary | None = None if request.param == "torch" else best_library()
    return build_torch_executor(
        tiny_llama(), LAYOUT, memory.blocks_address, memory.blocks, "cpu", check=False, library=library, masks=DigitMasks(6)
    )


def prompt(first: int) -> list[int]:
    return [first, *prompt_of(9)]


def generated(executor: Executor, first: int, count: int, **sampling: float) -> list[int]:
    return generate(executor, started(1, prompt(first), **sampling), range(10), count)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_grammar_lets_its_own_tokens_through_alone(executor: Executor, temperature: float) -> None:
    tokens = generated(executor, 10, 7, temperature=temperature)
    assert set(tokens[:6]) <= set(DIGITS)
    assert tokens[6] == EOS
    assert not set(generated(executor, 30, 7, temperature=temperature)) <= set(DIGITS)


def test_a_sequence_that_moved_goes_on_in_its_grammar(executor: Executor) -> None:
    whole = generated(executor, 10, 7, temperature=1.5)
    for cut in (1, 4, 6):
        moved = started(2, [*prompt(10), *whole[:cut]], 10, temperature=1.5)
        assert generate(executor, moved, range(20, 30), 7 - cut) == whole[cut:]


def test_a_free_neighbour_is_not_touched_by_a_grammar_beside_it(executor: Executor) -> None:
    free = generated(executor, 30, 2, temperature=0.7)

    def both(tokens: Sequence[int]) -> list[int]:
        end = 10 + len(tokens)
        first = end - 1 if tokens else 0
        rows = [chunk(1, first, end - first, range(10)), chunk(2, first, end - first, range(10, 20))]
        starts = () if tokens else (started(1, prompt(10), temperature=0.7), started(2, prompt(30), temperature=0.7))
        return [token_of(result) for result in run(executor, *rows, starts=starts)]

    first = both(())
    second = both((0,))
    assert [first[1], second[1]] == free
    assert {first[0], second[0]} <= set(DIGITS)


@pytest.mark.parametrize(("first", "words"), [(11, "refused"), (12, "does not cover")])
def test_a_broken_grammar_fails_its_own_sequence(executor: Executor, first: int, words: str) -> None:
    starts = (started(1, prompt(first)), started(2, prompt(30)))
    results = run(executor, chunk(1, 0, 10, range(10)), chunk(2, 0, 10, range(10, 20)), starts=starts)
    assert words in (results[0].fault or "")
    assert token_of(results[1]) == generated_alone(executor)
    assert words in (run(executor, chunk(1, 0, 10, range(10)))[0].fault or "")


def generated_alone(executor: Executor) -> int:
    return token_of(run(executor, chunk(3, 0, 10, range(20, 30)), starts=[started(3, prompt(30))])[0])


def test_a_token_that_the_grammar_does_not_take_fails_the_sequence_that_brought_it(executor: Executor) -> None:
    wrong = started(1, [*prompt(10), 99], 10)
    assert "refused a token" in (run(executor, chunk(1, 0, 11, range(10)), starts=[wrong])[0].fault or "")
