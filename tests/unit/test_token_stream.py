"""One choice at its gateway: what a frame delivers, said with literal frames."""

import pytest

from common.protocol.token_stream import MAX_FRAMES_AHEAD, TokenStream
from common.values.errors import InvariantBroken
from common.values.tokens import Ending, NewTokens, PositionLogprobs

END = Ending(reason="length")


def stream(attempt: int = 1) -> TokenStream:
    made = TokenStream(choice=0)
    made.raise_attempt(attempt)
    return made


def new(first: int, *tokens: int, ending: Ending | None = None) -> NewTokens:
    logprobs = tuple(PositionLogprobs(logprob=-float(token), rank=1) for token in tokens)
    return NewTokens(first=first, tokens=tokens, logprobs=logprobs, ending=ending)


def test_what_is_next_is_delivered_at_once() -> None:
    choice = stream()
    assert choice.accept(1, new(0, 10)) == [new(0, 10)]
    assert choice.accept(1, new(1, 11, 12)) == [new(1, 11, 12)]
    assert choice.next_index == 3


def test_what_is_ahead_waits_for_the_gap_to_close() -> None:
    choice = stream()
    assert choice.accept(1, new(2, 12, ending=END)) == []
    assert choice.accept(1, new(1, 11)) == []
    assert choice.has_gap
    assert choice.accept(1, new(0, 10)) == [new(0, 10), new(1, 11), new(2, 12, ending=END)]
    assert choice.ended
    assert not choice.has_gap


def test_of_what_is_known_in_part_only_the_rest_is_delivered_with_its_own_scores() -> None:
    choice = stream()
    choice.accept(1, new(0, 10, 11))
    assert choice.accept(1, new(0, 10, 11, 12)) == [new(2, 12)]
    assert choice.accept(1, new(1, 11, 12)) == []


def test_an_ending_without_tokens_is_delivered_once() -> None:
    choice = stream()
    choice.accept(1, new(0, 10))
    assert choice.accept(1, new(1, ending=END)) == [new(1, ending=END)]
    assert choice.accept(1, new(1, ending=END)) == []


def test_an_ending_that_comes_with_known_tokens_is_delivered_alone() -> None:
    choice = stream()
    choice.accept(1, new(0, 10, 11))
    assert choice.accept(1, new(0, 10, 11, ending=END)) == [new(2, ending=END)]


def test_other_attempts_deliver_nothing() -> None:
    choice = stream(2)
    assert choice.accept(1, new(0, 10)) == []
    assert choice.accept(3, new(0, 10)) == []
    assert choice.next_index == 0


def test_a_new_attempt_drops_what_waited() -> None:
    choice = stream()
    choice.accept(1, new(1, 11))
    choice.raise_attempt(2)
    assert not choice.has_gap
    assert choice.accept(2, new(0, 10)) == [new(0, 10)]


@pytest.mark.parametrize("attempt", [0, 1])
def test_attempts_only_rise(attempt: int) -> None:
    with pytest.raises(InvariantBroken):
        stream(1).raise_attempt(attempt)


def test_the_scores_of_the_prompt_come_with_index_0_only() -> None:
    choice = stream()
    scored = (PositionLogprobs(logprob=-1.0, rank=1),)
    (first,) = choice.accept(1, NewTokens(first=0, tokens=(10,), prompt_logprobs=scored))
    (rest,) = choice.accept(1, NewTokens(first=0, tokens=(10, 11), prompt_logprobs=scored))
    assert first.prompt_logprobs == scored
    assert rest.prompt_logprobs is None


def test_of_two_frames_with_one_start_the_longer_one_waits() -> None:
    choice = stream()
    choice.accept(1, new(1, 11, 12, ending=END))
    choice.accept(1, new(1, 11))
    assert choice.accept(1, new(0, 10)) == [new(0, 10), new(1, 11, 12, ending=END)]


def test_the_buffer_of_frames_ahead_is_bounded_and_a_replay_brings_the_rest() -> None:
    choice = stream()
    last = MAX_FRAMES_AHEAD + 10
    for index in range(1, last):
        choice.accept(1, new(index, index))
    assert len(choice.ahead) == MAX_FRAMES_AHEAD
    choice.accept(1, new(0, 0))
    assert choice.next_index == MAX_FRAMES_AHEAD + 1
    choice.accept(1, new(0, *range(last)))
    assert choice.tokens == list(range(last))


def test_of_a_closed_stream_nothing_more_is_taken_and_nothing_waits() -> None:
    choice = stream()
    choice.accept(1, new(1, 11))
    choice.close()
    choice.close()
    assert choice.ended
    assert not choice.has_gap
    assert choice.accept(1, new(0, 10)) == []
    choice.check_invariants()


def test_what_the_table_lacks_is_a_broken_invariant() -> None:
    choice = stream()
    choice.close()
    with pytest.raises(InvariantBroken):
        choice.raise_attempt(2)
