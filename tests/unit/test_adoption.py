"""A request changes its gateway: what the core does that takes it over, and the one that loses it."""

from common.mesh.adoption import adopted_request, logged_tokens
from common.mesh.gateway import GatewayCore
from common.mesh.gateway_effects import Deliver, Dropped, Ended, SendCancel, SendDispatch, SendReplay
from common.protocol.request_record import (
    IdempotencyMark,
    RecordedError,
    RequestFacts,
    RequestRecord,
    attempt_change,
    ending_change,
    first_record,
    ownership,
    parse_record,
)
from common.protocol.stored_log import LogEntry, StoredChoice, assemble, decode_entry, encode_entry
from common.values.ids import GatewayId, Incarnation, WorkerId
from common.values.sampling import SamplingParameters
from common.values.tokens import DEADLINE_CODE, Ending, NewTokens, PositionLogprobs
from tests.gateway_driver import END, MODEL, Driver, R

SCORE = PositionLogprobs(logprob=-1.0, rank=1)


def facts(**changes: object) -> RequestFacts:
    fields = {"model": MODEL, "sampling": SamplingParameters(max_tokens=8, seed=1), "choices": 1, **changes}
    return RequestFacts(**fields)  # type: ignore[arg-type]


def adopt(d: Driver, log: dict[int, StoredChoice], *, worker: str | None = "a", now: float = 5.0, **changes: object) -> None:
    known = facts(**changes)
    record = RequestRecord(
        state="running",
        owner=GatewayId("other"),
        epoch=3,
        attempt=2,
        prompt=(1, 2, 3),
        facts=known,
        worker=None if worker is None else WorkerId(worker),
    )
    d.core.adopt(adopted_request(R, record, log, epoch=4, deadline=None), logged_tokens(known, log), now)


def logged(*tokens: int, attempt: int = 2) -> StoredChoice:
    return StoredChoice(attempt=attempt, tokens=list(tokens), logprobs=[None] * len(tokens))


def test_the_log_is_delivered_and_the_worker_is_asked_for_the_rest_with_the_higher_epoch() -> None:
    d = Driver()
    d.know("a", 5.0)
    adopt(d, {0: logged(5, 6)})
    assert [effect.new.tokens for effect in d.take() if isinstance(effect, Deliver)] == [(5, 6)]
    d.core.on_tick(5.0)
    [probe] = [effect for effect in d.take() if isinstance(effect, SendReplay)]
    assert [(item.next_index, item.attempt, item.epoch) for item in probe.items] == [(2, 2, 4)]
    d.replay("a", "running", attempt=2, new=NewTokens(first=2, tokens=(7,)), now=5.1)
    d.frame("a", 3, 8, end=True, attempt=2, now=5.2)
    assert d.delivered() == [5, 6, 7, 8]
    assert d.ends() == [None]


def test_a_worker_that_lost_it_is_replaced_under_a_higher_attempt_and_epoch() -> None:
    d = Driver()
    d.know("a", 5.0)
    adopt(d, {0: logged(5, 6)})
    d.core.on_tick(5.0)
    d.take()
    d.replay("a", "unknown", attempt=2, now=5.1)
    [sent] = [effect for effect in d.take() if isinstance(effect, SendDispatch)]
    assert (sent.dispatch.attempt, sent.dispatch.epoch, sent.dispatch.choices[0].tokens) == (3, 4, [5, 6])


def test_a_request_that_was_never_placed_is_placed_at_once() -> None:
    d = Driver()
    d.know("a", 5.0)
    adopt(d, {}, worker=None)
    assert d.dispatches() == [("a", 3)]


def test_a_log_that_tells_all_needs_nobody() -> None:
    d = Driver()
    whole = logged(5, 6)
    whole.ending = END
    adopt(d, {0: whole}, worker="dead")
    assert [type(effect) for effect in d.take()] == [Deliver, Ended]
    assert d.core.active == 0


def test_tokens_without_the_scores_that_were_asked_for_are_made_again() -> None:
    sampling = SamplingParameters(max_tokens=8, seed=1, logprobs=1)
    stored = StoredChoice(attempt=2, tokens=[5, 6, 7], logprobs=[SCORE, None, SCORE])
    assert logged_tokens(facts(sampling=sampling), {0: stored})[0].tokens == (5,)
    prompt_scores = SamplingParameters(max_tokens=8, seed=1, prompt_logprobs=1)
    assert logged_tokens(facts(sampling=prompt_scores), {0: logged(5, 6)}) == {}
    assert logged_tokens(facts(), {1: logged(5)}) == {}, "a choice that the request has not"


def test_whoever_was_passed_drops_the_request_and_cancels_nothing() -> None:
    d = Driver()
    d.started("a")
    d.frame("a", 0, 5, now=0.1)
    d.take()
    d.core.on_tick(10.0)
    d.take()
    d.replay("a", "adopted", now=10.1)
    assert d.take() == [Dropped(request_id=R)]
    assert d.core.active == 0
    d.core.drop(R, 10.2)
    d.frame("a", 1, 6, now=10.2)
    assert not [effect for effect in d.take() if isinstance(effect, SendCancel)], "a frame that was under way"


def test_a_cancel_that_was_lost_is_repeated_with_the_epoch_that_counts() -> None:
    d = Driver()
    d.know("a", 5.0)
    adopt(d, {0: logged(5)})
    d.core.cancel(R, None, 5.0)
    d.take()
    d.frame("a", 1, 6, attempt=2, now=8.0)
    assert [effect.cancel.epoch for effect in d.take() if isinstance(effect, SendCancel)] == [4]


def test_a_record_is_read_as_it_was_written() -> None:
    known = facts(body=b"b", salt=b"s", tenant="t", lingers=True, deadline_s=9.0, idempotency=IdempotencyMark(key="k", digest=b"d"))
    fields = first_record(gateway=GatewayId("g"), epoch=1, prompt=(1, 2), facts=known, created=1.0)
    record = parse_record({**fields, **attempt_change(2, "w", None), **ownership(GatewayId("h"), 7)})
    assert (record.owner, record.epoch, record.attempt, record.worker, record.decode_worker) == ("h", 7, 2, "w", None)
    assert (record.prompt, record.facts, record.state, record.error) == ((1, 2), known, "running", None)
    error = RecordedError(message="m", code="c", status=500)
    over = parse_record({**fields, **ending_change("failed", seconds={}, tokens=1, error=error, keep_prompt=False)})
    assert (over.state, over.prompt, over.error) == ("failed", (), error)
    kept = parse_record({**fields, **ending_change("ended", seconds={}, tokens=1, error=None, keep_prompt=True)})
    assert kept.prompt == (1, 2)


def test_scores_that_nobody_has_any_more_are_computed_again() -> None:
    """The worker was given tokens whose log-probabilities were lost with another one, before they came into the log."""
    d = Driver()
    d.know("a", 5.0)
    stored = StoredChoice(attempt=2, tokens=[5, 6, 7], logprobs=[SCORE, None, None])
    adopt(d, {0: stored}, sampling=SamplingParameters(max_tokens=8, seed=1, logprobs=0))
    d.replay("a", "running", attempt=2, new=NewTokens(first=1, tokens=(6, 7, 8)), now=5.1)
    [dispatch] = [effect.dispatch for effect in d.take() if isinstance(effect, SendDispatch)]
    assert (dispatch.attempt, dispatch.choices[0].tokens) == (3, [5])


def test_a_deadline_that_a_worker_kept_ends_the_adopted_request_not_its_choice() -> None:
    stored = logged(5, 6)
    stored.ending = Ending(reason="error", error_code=DEADLINE_CODE)
    [known] = logged_tokens(facts(), {0: stored}).values()
    assert (known.tokens, known.ending) == ((5, 6), None)


def test_frames_for_a_gateway_that_died_under_this_id_are_left_to_who_adopts_the_request() -> None:
    d = Driver()
    d.core = GatewayCore(gateway=GatewayId("g"), incarnation=Incarnation("2"), strays_from=30.0)
    d.frame("a", 0, 5, attempt=1, now=1.0)
    assert not [effect for effect in d.take() if isinstance(effect, SendCancel)]
    d.frame("a", 1, 6, attempt=1, now=31.0)
    assert [effect for effect in d.take() if isinstance(effect, SendCancel)]


def test_the_log_of_a_prompt_of_one_token_is_complete_without_scores_of_its_prompt() -> None:
    entry = LogEntry(choice=0, attempt=1, writer="w", new=NewTokens(first=0, tokens=(5,), prompt_logprobs=()))
    stored = assemble([decode_entry(encode_entry(entry))])
    [known] = logged_tokens(facts(sampling=SamplingParameters(max_tokens=8, seed=1, prompt_logprobs=0)), stored).values()
    assert (known.tokens, known.prompt_logprobs) == ((5,), ())
