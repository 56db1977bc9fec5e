"""Laws of the token stream: however frames are cut, ordered, repeated and lost, over any number of attempts, what is
delivered is the log, gapless and once; and a replay always helps."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from common.protocol.token_stream import TokenStream
from common.values.tokens import Ending, NewTokens, PositionLogprobs

END = Ending(reason="length")
Event = tuple[str, int, int, int]
EVENTS = st.lists(
    st.tuples(st.sampled_from(["frame", "frame", "frame", "stale", "replay", "raise"]), *[st.integers(0, 30)] * 3), max_size=60
)


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

    def accept(self, attempt: int, new: NewTokens) -> None:
        before = self.stream.next_index
        for fresh in self.stream.accept(attempt, new):
            assert attempt == self.stream.attempt, "a token of another attempt"
            assert not self.endings, "something after the end"
            assert fresh.first == self.delivered, "a gap, or a token twice"
            assert fresh.tokens or fresh.ending, "nothing"
            assert list(fresh.tokens) == self.log[fresh.first : fresh.first + len(fresh.tokens)]
            assert [score.logprob for score in fresh.logprobs] == [-float(token) for token in fresh.tokens]
            self.delivered += len(fresh.tokens)
            self.endings += fresh.ending is not None
        assert self.stream.next_index == self.delivered >= before
        assert self.stream.tokens == self.log[: self.delivered]
        self.stream.check_invariants()
        assert self.stream.ended == bool(self.endings)
        if self.stream.ended:
            assert self.delivered == len(self.log)

    def happen(self, event: Event) -> None:
        kind, first, count, attempt = event
        stream = self.stream
        match kind:
            case "frame":
                self.accept(stream.attempt, cut(self.log, first, count % 6))
            case "stale":
                self.accept(attempt % stream.attempt, cut(self.log, first, count))
            case "replay":
                self.accept(stream.attempt, cut(self.log, stream.next_index, count))
            case "raise" if not stream.ended:
                stream.raise_attempt(stream.attempt + 1 + attempt)


@given(st.integers(0, 25), EVENTS)
def test_any_frames_of_any_attempts_deliver_the_log_in_order_and_once(length: int, events: list[Event]) -> None:
    watched = Watched([100 + index for index in range(length)])
    for event in events:
        watched.happen(event)
    watched.accept(watched.stream.attempt, cut(watched.log, watched.stream.next_index, length + 1))
    assert watched.stream.ended
    assert watched.endings == 1


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
