"""Laws of the token stream: however frames are cut, ordered, repeated and lost, over any number of attempts, what is
delivered is the log, gapless and once; and a replay always helps."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.protocol.token_stream import TRANSITIONS, TokenStream
from common.values.errors import InvariantBroken
from common.values.tokens import Ending, NewTokens, PositionLogprobs

END = Ending(reason="length")


def cut(log: list[int], first: int, count: int) -> NewTokens:
    """A frame of the log; the one that reaches its end carries the ending."""
    first = min(first, len(log))
    tokens = log[first : first + count]
    logprobs = tuple(PositionLogprobs(logprob=-float(token), rank=1) for token in tokens)
    return NewTokens(first=first, tokens=tuple(tokens), logprobs=logprobs, ending=END if first + count >= len(log) else None)


class Watched:
    """A stream whose deliveries are checked as they come."""

    def __init__(self, log: list[int]) -> None:
        self.log = log
        self.stream = TokenStream(choice=0)
        self.stream.raise_attempt(1)
        self.delivered = 0
        self.endings = 0
        self.closed = False

    def accept(self, attempt: int, new: NewTokens) -> None:
        before = self.stream.next_index
        for fresh in self.stream.accept(attempt, new):
            assert attempt == self.stream.attempt, "a token of another attempt"
            assert not self.endings, "something after the end"
            assert not self.closed, "something that nobody wants"
            assert fresh.first == self.delivered, "a gap, or a token twice"
            assert fresh.tokens or fresh.ending, "nothing"
            assert list(fresh.tokens) == self.log[fresh.first : fresh.first + len(fresh.tokens)]
            assert [score.logprob for score in fresh.logprobs] == [-float(token) for token in fresh.tokens]
            self.delivered += len(fresh.tokens)
            self.endings += fresh.ending is not None
        assert self.stream.next_index == self.delivered >= before
        assert self.stream.tokens == self.log[: self.delivered]
        self.stream.check_invariants()
        assert self.stream.ended == (bool(self.endings) or self.closed)
        if self.endings:
            assert self.delivered == len(self.log)

    def close(self) -> None:
        self.closed = self.closed or not self.stream.ended
        self.stream.close()


class StreamMachine(RuleBasedStateMachine):
    """Any frames of any attempts; after each the laws of `Watched`, and no step that the table does not have."""

    @initialize(length=st.integers(0, 25))
    def begin(self, length: int) -> None:
        self.watched = Watched([100 + index for index in range(length)])
        self.before = self.stream.state

    @property
    def stream(self) -> TokenStream:
        return self.watched.stream

    @rule(first=st.integers(0, 30), count=st.integers(0, 5))
    def a_frame_comes(self, first: int, count: int) -> None:
        self.watched.accept(self.stream.attempt, cut(self.watched.log, first, count))

    @rule(first=st.integers(0, 30), count=st.integers(0, 30), attempt=st.integers(0, 30))
    def a_frame_of_a_dead_attempt_comes(self, first: int, count: int, attempt: int) -> None:
        state, delivered = self.stream.state, self.watched.delivered
        self.watched.accept(attempt % self.stream.attempt, cut(self.watched.log, first, count))
        assert (self.stream.state, self.watched.delivered) == (state, delivered)

    @rule(count=st.integers(0, 30))
    def a_replay_comes(self, count: int) -> None:
        stream, known = self.stream, self.watched.delivered
        self.watched.accept(stream.attempt, cut(self.watched.log, stream.next_index, count))
        assert stream.ended or self.watched.delivered >= known + min(count, len(self.watched.log) - known)

    @precondition(lambda self: not self.stream.ended)
    @rule(more=st.integers(1, 30))
    def the_attempt_is_raised(self, more: int) -> None:
        self.stream.raise_attempt(self.stream.attempt + more)
        assert not self.stream.has_gap

    @precondition(lambda self: self.stream.ended)
    @rule(attempt=st.integers(1, 30))
    def an_ended_stream_has_no_further_attempt(self, attempt: int) -> None:
        with pytest.raises(InvariantBroken):
            self.stream.raise_attempt(self.stream.attempt + attempt)

    @rule(really=st.integers(0, 9))
    def no_more_is_wanted(self, really: int) -> None:
        """Seldom, so that other things happen too."""
        if really == 0:
            self.watched.close()

    @invariant()
    def only_steps_of_the_table(self) -> None:
        after = self.stream.state
        assert after is self.before or after in TRANSITIONS[self.before].values()
        self.before = after
        self.stream.check_invariants()

    def teardown(self) -> None:
        """Whatever happened, one replay of the rest ends it."""
        if hasattr(self, "watched"):
            watched, length = self.watched, len(self.watched.log)
            watched.accept(watched.stream.attempt, cut(watched.log, watched.stream.next_index, length + 1))
            assert watched.stream.ended
            assert watched.endings == (not watched.closed)


TestStream = StreamMachine.TestCase
TestStream.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(st.integers(1, 25), st.data())
def test_frames_that_all_arrive_need_no_replay_whatever_their_order(length: int, data: st.DataObject) -> None:
    watched = Watched([100 + index for index in range(length)])
    bounds = sorted({0, length, *data.draw(st.lists(st.integers(1, length)))})
    frames = [cut(watched.log, first, last - first) for first, last in pairwise(bounds)]
    cuts = st.builds(cut, st.just(watched.log), st.integers(0, length - 1), st.integers(0, length))
    for frame in data.draw(st.permutations(frames + data.draw(st.lists(cuts, max_size=8)))):
        watched.accept(1, frame)
    assert watched.delivered == length
    assert watched.endings == 1


@given(st.integers(2, 25), st.data())
def test_the_next_missing_token_is_asked_for_and_nothing_else(length: int, data: st.DataObject) -> None:
    """Where one frame is lost, a replay of just what lies before the next waiting one closes the gap."""
    watched = Watched([100 + index for index in range(length)])
    lost = data.draw(st.integers(0, length - 1))
    for index in range(length):
        if index != lost:
            watched.accept(1, cut(watched.log, index, 1))
    assert watched.stream.next_index == lost
    assert watched.stream.has_gap == (lost < length - 1)
    watched.accept(1, cut(watched.log, lost, 1))
    assert watched.stream.ended
