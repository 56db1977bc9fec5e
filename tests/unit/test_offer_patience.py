"""How long an offer waits: for room at a living peer, and not longer for a frozen one than its silence proves it."""

from common.mesh.offer_patience import OfferPatience
from common.mesh.worker_registry import WorkerRegistry
from common.policy.watchdog import LEAST_ANSWER_S, LEAST_LOST_S
from common.protocol.handoff_sender import Sender
from common.protocol.messages import Offer, pack_ids
from common.values.ids import WorkerId
from common.values.sampling import SamplingParameters

D = WorkerId("d")
ROOM_S = 2.0
OFFER = Offer(
    request_id="r",
    choice=0,
    attempt=1,
    number=1,
    gateway="g",
    prompt=pack_ids((1, 2, 3)),
    tokens=[],
    sampling=SamplingParameters(max_tokens=4, seed=1),
    positions=3,
)


def patience(*, heard_at: float) -> OfferPatience:
    peers = WorkerRegistry()
    peers.heard(D, heard_at)
    return OfferPatience(peers, room_s=ROOM_S)


def test_an_unanswered_offer_waits_until_its_peer_is_silent_for_the_watchdogs_bound() -> None:
    assert patience(heard_at=10.0).ends_at(Sender(OFFER, D, 10.0)) == 10.0 + LEAST_LOST_S
    assert patience(heard_at=9.5).ends_at(Sender(OFFER, D, 10.0)) == 9.5 + LEAST_LOST_S


def test_an_offer_to_who_was_silent_before_waits_for_an_answer_only() -> None:
    assert patience(heard_at=5.0).ends_at(Sender(OFFER, D, 10.0)) == 10.0 + LEAST_ANSWER_S
    assert OfferPatience(WorkerRegistry(), room_s=ROOM_S).ends_at(Sender(OFFER, D, 10.0)) == 10.0 + LEAST_ANSWER_S


def test_a_crowded_peer_that_is_heard_is_given_time_to_find_room() -> None:
    sender = Sender(OFFER, D, 10.0)
    sender.on_busy(1)
    assert patience(heard_at=11.9).ends_at(sender) == 10.0 + ROOM_S
    assert patience(heard_at=10.1).ends_at(sender) == 10.1 + LEAST_LOST_S
