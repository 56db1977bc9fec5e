"""Laws of the text side, for any text, any stop strings, any cut into tokens."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from common.ports.generation import TokenEvent
from common.values.tokens import Ending, PositionLogprobs
from services.gateway.text.choice_text import ChoiceText, TextEvent
from services.gateway.text.detokenizer import Detokenizer
from services.gateway.text.stop_matcher import StopMatcher
from tests.gateway_twin import tiny_tokenizer

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
FEW_LETTERS = st.text("ab–", max_size=40)
STOPS = st.lists(st.text("ab–", min_size=1, max_size=5), max_size=4)


def cut_at_first_stop(text: str, stops: list[str], *, include: bool) -> str:
    """The rule said differently: go through the text by character; stop as soon as what was read ends in a stop string."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[:end] if include else text[: end - max(map(len, ending))]
    return text


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[start:end] for start, end in pairwise(places)]


@given(FEW_LETTERS, STOPS, st.lists(st.integers(0, 40)), st.booleans())
def test_any_split_gives_the_text_cut_at_the_first_stop_string(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    matcher = StopMatcher(stops, include_stop=include)
    shown = "".join(matcher.feed(piece) for piece in pieces_of(text, cuts)) + matcher.flush()
    assert shown == cut_at_first_stop(text, stops, include=include)
    assert matcher.matched == any(stop in text for stop in stops)


@given(FEW_LETTERS, STOPS)
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for length, character in enumerate(text, 1):
        shown += matcher.feed(character)
        if matcher.matched:
            return
        held = text[len(shown) : length]
        assert text[:length] == shown + held
        assert not held or any(stop.startswith(held) for stop in stops)


@given(st.lists(st.integers(0, tiny_tokenizer().get_vocab_size() - 1), max_size=30), st.booleans())
def test_deltas_concatenate_to_the_decoded_sequence(tokens: list[int], skip: bool) -> None:
    tokenizer = tiny_tokenizer()
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    text = "".join(detokenizer.step(token) for token in tokens) + detokenizer.flush()
    assert text == tokenizer.decode(tokens, skip_special_tokens=skip)


@given(ANY_TEXT)
def test_no_delta_of_a_text_holds_half_a_character(text: str) -> None:
    detokenizer = Detokenizer(tiny_tokenizer(), skip_special_tokens=True)
    deltas = [detokenizer.step(token) for token in tiny_tokenizer().encode(text).ids]
    assert "".join(deltas) == text
    assert all("\ufffd" not in delta for delta in deltas) or "\ufffd" in text


@given(ANY_TEXT | FEW_LETTERS, STOPS, st.integers(0, 6), st.booleans())
def test_a_choice_counts_and_shows_what_its_tokens_say(text: str, stops: list[str], min_tokens: int, include: bool) -> None:
    tokens = tiny_tokenizer().encode(text).ids
    if not tokens:
        return
    events, choice = run_choice(tokens, stops, min_tokens=min_tokens, include=include)
    shown = "".join(event.text for event in events)
    records = [record for event in events for record in event.records]
    assert text.startswith(shown)
    assert [record.token for record in records] == tokens[: choice.consumed]
    assert events[-1].finish is not None
    assert [event.consumed for event in events] == sorted({event.consumed for event in events}), "at most one event a token"
    if min_tokens == 0:
        assert shown == cut_at_first_stop(text, stops, include=include)


@given(ANY_TEXT | FEW_LETTERS, STOPS, st.integers(0, 6))
def test_tokens_after_a_match_change_nothing(text: str, stops: list[str], min_tokens: int) -> None:
    tokens = tiny_tokenizer().encode(text).ids
    if not tokens:
        return
    events, choice = run_choice(tokens, stops, min_tokens=min_tokens)
    if choice.stopped_early:
        again, _ = run_choice(tokens[: choice.consumed], stops, min_tokens=min_tokens)
        assert again == events
        assert choice.consumed > min_tokens


def run_choice(
    tokens: list[int], stops: list[str], *, min_tokens: int = 0, include: bool = False
) -> tuple[list[TextEvent], ChoiceText]:
    detokenizer = Detokenizer(tiny_tokenizer(), skip_special_tokens=True)
    choice = ChoiceText(choice=0, detokenizer=detokenizer, stops=StopMatcher(stops, include_stop=include), min_tokens=min_tokens)
    logprobs = PositionLogprobs(logprob=-1.0, rank=1)
    events = []
    for index, token in enumerate(tokens):
        ending = Ending(reason="length") if index == len(tokens) - 1 else None
        event = choice.feed(TokenEvent(choice=0, index=index, token=token, logprobs=logprobs, ending=ending))
        if event is not None:
            events.append(event)
    return events, choice
