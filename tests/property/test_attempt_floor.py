"""Laws of the attempt floors: a model that keeps everything for ever, beside the bounded table."""

from hypothesis import given
from hypothesis import strategies as st

from common.protocol.attempt_floor import KEEP_S, MAX_REQUESTS, AttemptFloors
from common.values.ids import RequestId, SequenceKey

REQUESTS = st.sampled_from([RequestId("a"), RequestId("b")])
CHOICES = st.integers(0, 2)
ATTEMPTS = st.integers(0, 6)
ADMIT = st.tuples(st.just("admit"), REQUESTS, CHOICES, ATTEMPTS)
CANCEL = st.tuples(st.just("cancel"), REQUESTS, st.none() | st.lists(CHOICES, max_size=3), ATTEMPTS)


@given(st.lists(ADMIT | CANCEL, max_size=40))
def test_the_floor_is_the_highest_of_what_was_admitted_and_what_follows_a_cancel(
    events: list[tuple[str, RequestId, object, int]],
) -> None:
    floors = AttemptFloors()
    model = {SequenceKey(request, choice): 0 for request in (RequestId("a"), RequestId("b")) for choice in range(3)}
    for kind, request, what, attempt in events:
        if kind == "admit":
            assert isinstance(what, int)
            key = SequenceKey(request, what)
            assert floors.is_stale(key, attempt) == (attempt < model[key])
            assert floors.admit(key, attempt, 0.0) == (attempt >= model[key])
            model[key] = max(model[key], attempt)
        else:
            choices = what if isinstance(what, list) else None
            floors.cancel(request, attempt, choices, 0.0)
            for key in model:
                if key.request_id == request and (choices is None or key.choice in choices):
                    model[key] = max(model[key], attempt + 1)
        for key, floor in model.items():
            assert floors.floor(key) == floor
    assert len(floors) <= 2


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 200)), min_size=1, max_size=30))
def test_a_floor_is_kept_for_its_time_after_the_last_touch_and_no_longer(touches: list[tuple[int, int]]) -> None:
    floors, touched, now = AttemptFloors(), dict[RequestId, float](), 0.0
    for number, pause in touches:
        now += pause
        request = RequestId(f"r{number}")
        floors.cancel(request, 1, None, now)
        touched[request] = now
        floors.expire(now)
        touched = {request: at for request, at in touched.items() if now - at < KEEP_S}
        assert len(floors) == len(touched)
        assert all(floors.is_stale(SequenceKey(request, 0), 1) for request in touched)


def test_the_table_is_bounded_and_the_oldest_go_first() -> None:
    floors = AttemptFloors()
    for number in range(MAX_REQUESTS + 10):
        floors.cancel(RequestId(f"r{number}"), 1, None, 0.0)
    floors.expire(0.0)
    assert len(floors) == MAX_REQUESTS
    assert floors.floor(SequenceKey(RequestId("r9"), 0)) == 0
    assert floors.floor(SequenceKey(RequestId("r10"), 0)) == 2
