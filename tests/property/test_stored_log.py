"""The token log in the store: however it was cut, repeated, interleaved or holed, what is read is a prefix of the truth."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from common.protocol.stored_log import LogEntry, StoredChoice, assemble, decode_entry, encode_entry
from common.values.tokens import Ending, NewTokens, PositionLogprobs

END = Ending(reason="length")


def _truth(choice: int, count: int) -> tuple[tuple[int, ...], tuple[PositionLogprobs, ...]]:
    tokens = tuple(1000 * choice + i for i in range(count))
    return tokens, tuple(PositionLogprobs(logprob=-float(token), rank=1) for token in tokens)


def _segment(rng: random.Random, choice: int, attempt: int, *, given: int, upto: int, total: int, lossy: bool) -> list[LogEntry]:
    """What a worker writes that was given `given` tokens and emitted up to `upto`; it begins again after each loss."""
    tokens, logprobs = _truth(choice, upto)
    written, at, begin = [], given, True
    while at < upto or begin:
        end = min(upto, at + rng.randint(1, 7))
        first = 0 if begin else at
        new = NewTokens(
            first=first, tokens=tokens[first:end], logprobs=logprobs[max(first, given) : end], ending=END if end == total else None
        )
        at = end
        begin = lossy and rng.random() < 0.3
        if not begin:
            written.append(LogEntry(choice=choice, attempt=attempt, writer=f"w{attempt}", new=new))
        elif at >= upto:
            break
    return written


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_the_highest_attempt_is_read_as_far_as_it_was_written(seed: int, choices: int, attempts: int, lossy: bool) -> None:
    rng = random.Random(seed)
    total = rng.randint(1, 60)
    queues: list[list[LogEntry]] = []
    furthest: dict[int, int] = {}
    for choice in range(choices):
        reached = 0
        for attempt in range(1, attempts + 1):
            upto = rng.randint(reached, total)
            if upto > reached or attempt == 1:
                queues.append(_segment(rng, choice, attempt, given=reached, upto=upto, total=total, lossy=lossy))
                reached = upto
        furthest[choice] = reached
    entries = []
    while any(queues):
        entries.append(decode_entry(encode_entry(rng.choice([q for q in queues if q]).pop(0))))
    found = assemble(entries)
    for choice in range(choices):
        tokens, logprobs = _truth(choice, total)
        stored = found.get(choice, StoredChoice(attempt=0))
        assert stored.tokens == list(tokens[: len(stored.tokens)])
        assert all(have in (None, true) for have, true in zip(stored.logprobs, logprobs, strict=False))
        assert (stored.ending is not None) <= (len(stored.tokens) == total)
        whole = stored.new_tokens(with_logprobs=True)
        assert whole.logprobs == logprobs[: len(whole.tokens)]
        if not lossy:
            assert len(stored.tokens) == furthest[choice]
            assert (stored.ending is not None) == (furthest[choice] == total)
            assert stored.new_tokens(with_logprobs=True).tokens == tuple(stored.tokens)


def test_a_lower_attempt_that_got_further_does_not_count() -> None:
    """Its tokens may have reached nobody, and the higher one is what goes on."""
    far = LogEntry(choice=0, attempt=1, writer="a", new=NewTokens(first=0, tokens=(1, 2, 3, 4)))
    near = LogEntry(choice=0, attempt=2, writer="b", new=NewTokens(first=0, tokens=(1, 2)))
    assert assemble([far, near])[0].tokens == [1, 2]
    assert assemble([near, far])[0].tokens == [1, 2]


def test_a_gateway_that_was_taken_over_from_spoils_nothing_with_a_later_attempt() -> None:
    """It froze, another one ended the request, and it began an attempt when it woke up: whoever comes back reads the whole."""
    whole = LogEntry(choice=0, attempt=1, writer="a", new=NewTokens(first=0, tokens=(1, 2, 3), ending=END), epoch=2)
    stale = LogEntry(choice=0, attempt=2, writer="b", new=NewTokens(first=0, tokens=(1, 2)), epoch=1)
    for entries in ([whole, stale], [stale, whole]):
        found = assemble(decode_entry(encode_entry(entry)) for entry in entries)[0]
        assert (found.tokens, found.ending) == ([1, 2, 3], END)


def test_a_worker_goes_on_with_its_segment_under_another_owner() -> None:
    before = LogEntry(choice=0, attempt=1, writer="a", new=NewTokens(first=0, tokens=(1, 2)), epoch=1)
    after = LogEntry(choice=0, attempt=1, writer="a", new=NewTokens(first=2, tokens=(3,)), epoch=2)
    stale = LogEntry(choice=0, attempt=2, writer="b", new=NewTokens(first=0, tokens=(1,)), epoch=1)
    assert assemble([before, stale, after])[0].tokens == [1, 2, 3]
