"""Laws of the token log: a replay from any index is what was appended from there on; ended logs are kept for their time."""

from hypothesis import given
from hypothesis import strategies as st

from common.protocol.token_log import KEEP_S, MAX_ENDED, SequenceLog, TokenLogs
from common.values.ids import GatewayId, Incarnation, Owner, RequestId, SequenceKey
from common.values.tokens import Ending, NewTokens, PositionLogprobs

OWNER = Owner(GatewayId("g"), Incarnation("i"))
TOKENS = st.lists(st.integers(0, 9), max_size=4)


def logprob(token: int) -> PositionLogprobs:
    return PositionLogprobs(logprob=-float(token), rank=1)


@given(st.lists(TOKENS, max_size=6), st.booleans(), st.booleans(), st.integers(0, 30))
def test_a_replay_from_any_index_continues_what_is_there(chunks: list[list[int]], ended: bool, scored: bool, index: int) -> None:
    log = SequenceLog(owner=OWNER, attempt=1)
    tokens: list[int] = []
    for chunk in chunks:
        log.append(NewTokens(first=len(tokens), tokens=tuple(chunk), logprobs=tuple(map(logprob, chunk)) if scored else ()))
        tokens += chunk
    if ended:
        log.append(NewTokens(first=len(tokens), tokens=(), ending=Ending(reason="length")))
    new = log.since(index)
    if new is None:
        assert index >= len(tokens)
        assert not ended
        return
    assert [*tokens[:index], *new.tokens] == tokens
    assert new.first == min(index, len(tokens))
    assert new.logprobs == (tuple(map(logprob, new.tokens)) if scored else ())
    assert (new.ending is not None) == ended


@given(
    st.lists(st.tuples(st.sampled_from(["open", "close", "forget", "expire"]), st.integers(0, 3), st.integers(0, 150)), max_size=30)
)
def test_running_logs_stay_and_ended_ones_go_after_their_time(events: list[tuple[str, int, int]]) -> None:
    logs, model, now = TokenLogs(), dict[SequenceKey, float | None](), 0.0
    for kind, number, pause in events:
        now += pause
        key = SequenceKey(RequestId(f"r{number // 2}"), number % 2)
        if kind == "open":
            logs.open(key, SequenceLog(owner=OWNER, attempt=1))
            model[key] = None
        elif kind == "close" and key in model:
            logs.close(key, "ended", now)
            model[key] = now
        elif kind == "forget":
            logs.forget(key)
            model.pop(key, None)
        logs.expire(now)
        model = {k: over_at for k, over_at in model.items() if over_at is None or now - over_at < KEEP_S}
        assert len(logs) == len(model)
        for request in (RequestId("r0"), RequestId("r1")):
            assert [k for k, _ in logs.of_request(request)] == sorted(k for k in model if k.request_id == request)


def test_ended_logs_are_bounded() -> None:
    logs = TokenLogs()
    for number in range(MAX_ENDED + 5):
        key = SequenceKey(RequestId(f"r{number}"), 0)
        logs.open(key, SequenceLog(owner=OWNER, attempt=1))
        logs.close(key, "ended", 0.0)
    logs.expire(0.0)
    assert len(logs) == MAX_ENDED
    assert logs.get(SequenceKey(RequestId("r0"), 0)) is None


@given(given=st.integers(0, 6), made=st.integers(0, 8), index=st.integers(0, 16))
def test_log_probabilities_stay_with_their_tokens_after_a_recovery(given: int, made: int, index: int) -> None:
    log = SequenceLog(owner=OWNER, attempt=2, given=given, tokens=list(range(given)))
    for token in range(given, given + made):
        scores = (PositionLogprobs(logprob=-float(token), rank=1),)
        log.append(NewTokens(first=token, tokens=(token,), logprobs=scores))
    new = log.since(index)
    if new is not None and index >= given:
        assert [-scores.logprob for scores in new.logprobs] == list(new.tokens)
    taken_over = SequenceLog(owner=OWNER, attempt=2)
    taken_over.restart(log.whole())
    again = taken_over.since(max(index, given))
    if again is not None:
        assert [-scores.logprob for scores in again.logprobs] == list(again.tokens)
