"""What a worker does with attempts, cancels and places in its queue, said with literal events."""

from random import Random

import msgspec
import pytest

from common.mesh.engine_values import SequenceJob
from common.mesh.sequence_engine import SequenceEngine
from common.mesh.worker_effects import SealBlocks, SendControl, SendNotices, SendTokens
from common.policy.batching import StepLimits
from common.policy.block_pool import BlockPool
from common.protocol.messages import (
    Accept,
    Ack,
    Cancel,
    ChoiceState,
    Dispatch,
    Held,
    Last,
    Offer,
    ReadyBlock,
    Refuse,
    ReplayItem,
    pack_ids,
)
from common.simulation.shadow_kv import EOS, ShadowKv, ShadowStep
from common.values.ids import ModelKey, RequestId, SequenceKey, WorkerId
from common.values.kv_layout import Fingerprint, KvLayout
from common.values.sampling import SamplingParameters
from common.values.tokens import DEADLINE_CODE, Ending
from tests.handoff_node import Node

KEY = SequenceKey(RequestId("r"), 0)


def node() -> Node:
    return Node("p", Random(1), 32, budget=16, sequences=4, waiting=4)


def dispatch(
    attempt: int, *, request: str = "r", choices: int = 1, prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 4
) -> Dispatch:
    return Dispatch(
        request_id=request,
        attempt=attempt,
        gateway="g",
        incarnation="i",
        model=ModelKey("m", "1"),
        prompt=pack_ids(prompt),
        choices=[ChoiceState(choice=n) for n in range(choices)],
        sampling=SamplingParameters(max_tokens=max_tokens, seed=1, ignore_eos=True),
    )


def step(node: Node) -> None:
    plan = node.core.plan(0.0)
    assert plan is not None
    node.step.submit(plan)
    node.core.on_step(node.step.perform(), 0.0)


def state(node: Node, attempt: int, choice: int = 0) -> str:
    (entry,) = node.core.on_replay([ReplayItem(request_id="r", choice=choice, attempt=attempt, next_index=0)])
    return entry.state


def test_a_cancel_that_overtakes_its_dispatch_fences_it() -> None:
    worker = node()
    worker.core.on_cancel(Cancel(request_id="r", attempt=1), 0.0)
    assert worker.core.on_dispatch(dispatch(1), 0.0).verdict == "stale"
    assert worker.core.on_dispatch(dispatch(2), 0.0).verdict == "accepted"


def test_a_cancel_of_one_choice_leaves_the_others() -> None:
    worker = node()
    worker.core.on_dispatch(dispatch(1, choices=2), 0.0)
    worker.core.on_cancel(Cancel(request_id="r", attempt=1, choices=[1]), 0.0)
    assert [state(worker, 1, 0), state(worker, 1, 1)] == ["queued", "unknown"]


def test_a_higher_attempt_replaces_a_lower_one() -> None:
    worker = node()
    worker.core.on_dispatch(dispatch(1), 0.0)
    worker.core.on_dispatch(dispatch(2), 0.0)
    assert [state(worker, 1), state(worker, 2)] == ["unknown", "queued"]
    assert worker.core.on_dispatch(dispatch(1), 0.0).verdict == "stale"
    worker.core.check_invariants()


def test_a_lower_attempt_is_refused_even_after_its_floor_has_expired() -> None:
    worker = node()
    worker.core.on_dispatch(dispatch(2), 0.0)
    worker.core.on_tick(1000.0)
    assert worker.core.on_dispatch(dispatch(1), 1000.0).verdict == "stale"
    assert state(worker, 2) == "queued"


def test_a_dispatch_that_comes_twice_runs_once() -> None:
    worker = node()
    worker.core.on_dispatch(dispatch(1), 0.0)
    step(worker)
    assert worker.core.on_dispatch(dispatch(1), 0.0).verdict == "accepted"
    assert state(worker, 1) == "running"
    assert worker.core.load().waiting == 0


def test_a_dispatch_that_comes_again_for_one_choice_more_leaves_the_running_ones() -> None:
    worker = node()
    worker.core.on_dispatch(dispatch(1), 0.0)
    step(worker)
    assert worker.core.on_dispatch(dispatch(1, choices=2), 0.0).verdict == "accepted"
    assert [state(worker, 1, 0), state(worker, 1, 1)] == ["running", "queued"]


def test_what_cannot_be_served_is_refused_with_the_clients_code() -> None:
    worker = node()
    assert worker.core.on_dispatch(dispatch(1, prompt=()), 0.0).code == "invalid_request"
    assert worker.core.on_dispatch(dispatch(1, prompt=(1, 10_000)), 0.0).code == "invalid_request"
    assert worker.core.on_dispatch(dispatch(1, prompt=(1,) * 40), 0.0).code == "context_length_exceeded"
    small = Node("p", Random(1), 2, budget=16, sequences=4, waiting=4)
    assert small.core.on_dispatch(dispatch(1, max_tokens=20), 0.0).code == "kv_cache_too_small"
    assert [worker.core.idle, small.core.idle] == [True, True]


def test_what_was_accepted_before_passes_a_full_queue_up_to_twice_its_bound() -> None:
    worker = node()
    for number in range(4):
        worker.core.on_dispatch(dispatch(1, request=f"new{number}"), 0.0)
    again = [msgspec.structs.replace(dispatch(2, request=f"again{number}", choices=3), accepted_before=True) for number in range(2)]
    assert [worker.core.on_dispatch(each, 0.0).verdict for each in again] == ["accepted", "full"]
    assert worker.core.load().waiting == 7
    assert worker.core.on_dispatch(msgspec.structs.replace(dispatch(2), accepted_before=True), 0.0).verdict == "accepted"
    assert worker.core.on_dispatch(dispatch(1, request="new"), 0.0).verdict == "full"
    worker.core.check_invariants()


def test_a_full_queue_and_a_draining_worker_say_full() -> None:
    worker = node()
    for number in range(4):
        assert worker.core.on_dispatch(dispatch(1, request=f"r{number}"), 0.0).verdict == "accepted"
    assert worker.core.on_dispatch(dispatch(1, request="one too many"), 0.0).verdict == "full"
    empty = node()
    empty.core.drain(0.0)
    assert empty.core.on_dispatch(dispatch(1), 0.0).verdict == "full"


def test_a_worker_ends_what_is_past_its_deadline_and_refuses_what_is_for_another_model() -> None:
    worker = node()
    worker.core.on_dispatch(msgspec.structs.replace(dispatch(1), remaining_s=2.0), 0.0)
    step(worker)
    worker.core.take_effects()
    worker.core.on_tick(1.9)
    assert state(worker, 1) == "running"
    worker.core.on_tick(2.1)
    (frame,) = [effect for effect in worker.core.take_effects() if isinstance(effect, SendTokens)]
    assert frame.entries[0].new.ending == Ending(
        reason="error", error_code=DEADLINE_CODE, error_message="the request's deadline has passed"
    )
    assert state(worker, 1) == "ended"
    assert worker.core.idle
    assert (
        worker.core.on_dispatch(msgspec.structs.replace(dispatch(1, request="r2"), model=ModelKey("m", "2")), 3.0).code
        == "wrong_model"
    )


def test_what_is_left_of_a_deadline_goes_with_the_offer() -> None:
    worker = node()
    worker.core.on_peer_joined(WorkerId("q"))
    worker.core.on_dispatch(msgspec.structs.replace(dispatch(1), remaining_s=5.0, decode_worker="q"), 10.0)
    plan = worker.core.plan(12.0)
    assert plan is not None
    worker.step.submit(plan)
    worker.core.on_step(worker.step.perform(), 12.0)
    (sent,) = [e.message for e in worker.core.take_effects() if isinstance(e, SendControl) and isinstance(e.message, Offer)]
    assert sent.remaining_s == 3.0


def offer(**changes: object) -> Offer:
    fields: dict[str, object] = {
        "request_id": "r",
        "choice": 0,
        "attempt": 1,
        "number": 7,
        "gateway": "g",
        "prompt": pack_ids((1, 2, 3)),
        "tokens": [],
        "sampling": SamplingParameters(max_tokens=4, seed=1),
        "positions": 3,
    }
    return Offer(**(fields | changes))  # type: ignore[arg-type]


def test_an_offer_that_does_not_add_up_is_refused_and_nothing_is_held() -> None:
    for wrong in ({"prompt": b""}, {"positions": 0}, {"positions": 9}, {"tokens": [10_000]}, {"tokens": [2**63]}, {"tokens": [-1]}):
        worker = node()
        worker.core.on_peer_joined(WorkerId("q"))
        worker.core.on_control(WorkerId("q"), offer(**wrong), 0.0)
        assert [type(effect.message).__name__ for effect in worker.core.take_effects()] == ["Refuse"]  # type: ignore[union-attr]
        assert worker.core.idle


def test_a_list_that_is_older_than_an_offer_does_not_end_it() -> None:
    """The refusal before it counts as a message too, or the peer would seem to have seen the offer."""
    worker, peer = node(), WorkerId("q")
    worker.core.on_peer_joined(peer)
    worker.core.on_control(peer, offer(request_id="another", positions=9), 0.0)
    worker.core.on_dispatch(msgspec.structs.replace(dispatch(1), decode_worker="q"), 0.0)
    step(worker)
    sent = [effect.message for effect in worker.core.take_effects() if isinstance(effect, SendControl)]
    assert [type(message) for message in sent] == [Refuse, Offer]
    worker.core.on_control(peer, Held(seen=1, sequences=[]), 0.0)
    assert not worker.core.desk.counters.settled
    worker.core.on_control(peer, Held(seen=2, sequences=[]), 0.0)
    assert worker.core.desk.counters.settled == {"kept": 1}


def notices_where_the_peer_takes(
    accepted: set[int], *, cancelled: frozenset[int] = frozenset(), acks: bool = True
) -> tuple[Node, list[tuple[str, int, str | None]]]:
    """Three choices of a request are to be handed to a peer, which has room for those alone; some are cancelled there."""
    worker, peer, notices = node(), WorkerId("q"), []
    worker.core.on_peer_joined(peer)
    worker.core.on_dispatch(msgspec.structs.replace(dispatch(1, choices=3), decode_worker="q"), 0.0)
    for _ in range(12):
        plan = worker.core.plan(0.0)
        if plan is not None:
            worker.step.submit(plan)
            worker.core.on_step(worker.step.perform(), 0.0)
        for effect in worker.core.take_effects():
            match effect:
                case SealBlocks():
                    ready = [ReadyBlock(index=b.index, block=b.block, generation=1, checksum=b"") for b in effect.blocks]
                    worker.core.on_sealed(effect.ticket, ready, 0.0)
                case SendControl(message=Offer() as asked):
                    worker.core.on_control(peer, answer_to(asked, accepted), 0.0)
                case SendControl(message=Last() as last):
                    if acks:
                        ack = Ack(request_id="r", choice=last.choice, attempt=1, reservation=last.reservation)
                        worker.core.on_control(peer, ack, 0.0)
                    if last.choice in cancelled:
                        worker.core.on_cancel(Cancel(request_id="r", attempt=1, choices=[last.choice]), 0.0)
                case SendNotices():
                    notices += [(notice.kind, notice.choice, notice.moved_to) for notice in effect.notices]
                case _:
                    pass
    return worker, notices


def answer_to(asked: Offer, accepted: set[int]) -> Accept | Refuse:
    if asked.choice in accepted:
        return Accept(
            request_id="r", choice=asked.choice, attempt=1, number=asked.number, first_block=0, reservation=bytes([asked.choice])
        )
    return Refuse(request_id="r", choice=asked.choice, attempt=1, number=asked.number, reason="full")


def test_what_cannot_follow_its_sibling_to_the_decode_worker_is_handed_back_and_never_decoded_here() -> None:
    """Whatever the request does to workers, it does it to one of them."""
    worker, notices = notices_where_the_peer_takes({0})
    assert notices == [("handed_back", 1, "q")]
    assert worker.core.idle
    assert [state(worker, 1, choice) for choice in range(3)] == ["moved", "unknown", "unknown"]


@pytest.mark.parametrize("acks", [True, False])
def test_a_sibling_that_was_cancelled_at_the_decode_worker_still_counts(acks: bool) -> None:
    """It may decode there until the peer hears of the cancel."""
    worker, notices = notices_where_the_peer_takes({0}, cancelled=frozenset({0}), acks=acks)
    assert notices == [("handed_back", 1, "q")]
    assert worker.core.idle


def test_of_a_request_that_is_cancelled_as_a_whole_nothing_stays_known() -> None:
    worker, _ = notices_where_the_peer_takes({0, 1, 2})
    assert [state(worker, 1, choice) for choice in range(3)] == ["moved"] * 3
    worker.core.on_cancel(Cancel(request_id="r", attempt=1), 0.0)
    assert [state(worker, 1, choice) for choice in range(3)] == ["unknown"] * 3


@pytest.mark.parametrize("accepted", [set[int](), {1}, {1, 2}])
def test_where_the_first_choice_stays_its_siblings_stay(accepted: set[int]) -> None:
    worker, notices = notices_where_the_peer_takes(accepted)
    assert notices == []
    assert [state(worker, 1, choice) for choice in range(3)] == ["ended"] * 3


def test_room_goes_to_what_was_preempted_before_it_goes_to_imports() -> None:
    kv = ShadowKv(4, 4)
    engine = SequenceEngine(
        fingerprint=Fingerprint(weights="w", dtype="float32", layout=KvLayout(layers=1, kv_heads=1, head_dim=1, block_size=4)),
        pool=BlockPool(4, kv.generations),
        limits=StepLimits(),
        max_model_len=64,
        eos_token_ids=EOS,
    )
    sampling = SamplingParameters(max_tokens=9, seed=1, ignore_eos=True)
    for number in range(2):
        key = SequenceKey(RequestId(f"r{number}"), 0)
        engine.submit(SequenceJob(key=key, prompt=(number, 1, 2, 3, 4, 5), sampling=sampling), 0.0)
    shadow = ShadowStep(kv)
    while not engine.load().preemptions:
        plan = engine.plan(0.0)
        assert plan is not None
        shadow.submit(plan)
        engine.complete(shadow.perform(), 0.0)
    newcomer = SequenceJob(key=KEY, prompt=(9,), sampling=SamplingParameters(max_tokens=1, seed=1))
    engine.release(SequenceKey(RequestId("r0"), 0))
    assert engine.reserve(newcomer, 1) is None
    engine.plan(0.0)
    assert engine.reserve(newcomer, 1) is None
    engine.release(SequenceKey(RequestId("r1"), 0))
