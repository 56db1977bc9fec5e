"""A request changes its gateway: what a worker does with owners, epochs, and gateways that fall silent."""

from random import Random

from common.mesh.owner_watch import SILENT_FOR_S, OwnerWatch
from common.mesh.worker_effects import SendTokens
from common.protocol.messages import Cancel, ChoiceState, Dispatch, ForwardedCancel, ReplayItem, pack_ids
from common.values.ids import GatewayId, Incarnation, ModelKey, Owner, WorkerId
from common.values.sampling import SamplingParameters
from tests.handoff_node import Node

FIRST, SECOND = Owner(GatewayId("g"), Incarnation("i")), Owner(GatewayId("h"), Incarnation("j"), 2)


def node_with_request(*, request: str = "r", attempt: int = 1) -> Node:
    node = Node("p", Random(1), 32, budget=16, sequences=4, waiting=4)
    assert node.core.on_dispatch(dispatch(request=request, attempt=attempt), 0.0).verdict == "accepted"
    return node


def dispatch(*, request: str = "r", attempt: int = 1, owner: Owner = FIRST) -> Dispatch:
    return Dispatch(
        request_id=request,
        attempt=attempt,
        gateway=owner.gateway,
        incarnation=owner.incarnation,
        epoch=owner.epoch,
        model=ModelKey("m", "1"),
        prompt=pack_ids((1, 2, 3)),
        choices=[ChoiceState(choice=0)],
        sampling=SamplingParameters(max_tokens=8, seed=1, ignore_eos=True),
    )


def probe(node: Node, owner: Owner, *, attempt: int = 1) -> str:
    item = ReplayItem(request_id="r", choice=0, attempt=attempt, next_index=0, epoch=owner.epoch)
    (entry,) = node.core.on_replay([item], owner.gateway, owner.incarnation)
    return entry.state


def gateways_of_step(node: Node) -> list[str]:
    plan = node.core.plan(0.0)
    assert plan is not None
    node.step.submit(plan)
    node.core.on_step(node.step.perform(), 0.0)
    return [effect.gateway for effect in node.core.take_effects() if isinstance(effect, SendTokens)]


def test_a_probe_of_a_higher_epoch_turns_the_frames_to_its_gateway() -> None:
    node = node_with_request()
    assert gateways_of_step(node) == ["g"]
    assert probe(node, SECOND) == "running"
    assert gateways_of_step(node) == ["h"]
    assert node.core.owners() == {SECOND}


def test_the_owner_before_is_told_and_can_change_nothing() -> None:
    node = node_with_request()
    probe(node, SECOND)
    assert probe(node, FIRST) == "adopted"
    node.core.on_cancel(Cancel(request_id="r", attempt=1), 0.0)
    assert node.core.counters.stale_cancels == 1
    assert node.core.on_dispatch(dispatch(attempt=2), 0.0).verdict == "stale"
    assert probe(node, SECOND) in ("queued", "running")
    node.core.on_cancel(Cancel(request_id="r", attempt=1, epoch=2), 0.0)
    assert probe(node, SECOND) == "unknown"
    assert node.core.idle


def test_a_dispatch_that_comes_again_from_a_new_owner_is_an_adoption_too() -> None:
    node = node_with_request()
    assert node.core.on_dispatch(dispatch(owner=SECOND), 0.0).verdict == "accepted"
    assert gateways_of_step(node) == ["h"]


def test_a_probe_for_another_attempt_adopts_nothing() -> None:
    node = node_with_request(attempt=2)
    assert probe(node, SECOND, attempt=1) == "unknown"
    assert node.core.owners() == {FIRST}


def test_what_a_lost_gateway_left_ends_and_nothing_else() -> None:
    node = node_with_request()
    node.core.on_dispatch(dispatch(request="other", owner=SECOND), 0.0)
    gateways_of_step(node)
    node.core.on_owner_lost(FIRST, 1.0)
    assert probe(node, FIRST) == "unknown"
    assert node.core.owners() == {SECOND}
    node.core.check_invariants()


def test_a_gateway_is_lost_once_it_was_silent_for_long_enough() -> None:
    watch = OwnerWatch()
    watch.beat(FIRST.gateway, FIRST.incarnation, 0.0)
    assert watch.lost([FIRST, SECOND], SILENT_FOR_S) == []
    assert watch.lost([FIRST, SECOND], SILENT_FOR_S + 1) == [FIRST], "the second is counted from when it was first seen"
    watch.beat(FIRST.gateway, FIRST.incarnation, SILENT_FOR_S + 1)
    assert watch.lost([FIRST], SILENT_FOR_S + 2) == []


def test_a_beat_of_another_life_does_not_count() -> None:
    watch = OwnerWatch()
    watch.lost([FIRST], 0.0)
    watch.beat(FIRST.gateway, Incarnation("another"), SILENT_FOR_S)
    assert watch.lost([FIRST], SILENT_FOR_S + 1) == [FIRST]


def test_silence_does_not_count_while_nobody_could_be_heard() -> None:
    watch = OwnerWatch()
    watch.lost([FIRST], 0.0)
    watch.refresh(SILENT_FOR_S)
    assert watch.lost([FIRST], SILENT_FOR_S + 1) == []
    assert watch.lost([FIRST], 2 * SILENT_FOR_S + 1) == [FIRST]


def test_a_cancel_that_a_worker_passes_on_is_its_owners() -> None:
    """Before LAST the sender was adopted, and so may be the receiver: the cancel has the owner's epoch there too."""
    node = node_with_request()
    assert probe(node, SECOND) in ("queued", "running")
    node.core.on_control(WorkerId("q"), ForwardedCancel(request_id="r", choice=0, attempt=1), 1.0)
    assert probe(node, SECOND) in ("queued", "running")
    node.core.on_control(WorkerId("q"), ForwardedCancel(request_id="r", choice=0, attempt=1, epoch=2), 1.0)
    assert probe(node, SECOND) == "unknown"
