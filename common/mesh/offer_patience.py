"""How long an offer may wait at a peer before its sequence is decoded where it was prefilled.

A living peer answers an offer at once, if only by BUSY: it is given a fixed time to find room. A peer that leaves an offer
unanswered, or that said BUSY and fell silent, is frozen once it was not heard in any way for the watchdog's bound: the same rule by
which gateways take a worker for lost, so that no stream waits longer for a frozen peer than for a frozen worker.
"""

from common.mesh.worker_registry import WorkerRegistry
from common.policy.watchdog import LEAST_ANSWER_S
from common.protocol.handoff_sender import Sender, SenderState
from common.values.slo import Slo


class OfferPatience:
    """`peers` is who was heard, and when; `room_s` is given to a living peer that has no room."""

    def __init__(self, peers: WorkerRegistry, *, room_s: float) -> None:
        self._peers = peers
        self._room_s = room_s
        self._slo = Slo()

    def ends_at(self, sender: Sender) -> float:
        """When an offer that waits is taken back, unless the peer answers or is heard before."""
        answer_s = 0.0 if sender.state is SenderState.BUSY else LEAST_ANSWER_S
        silent_at = self._peers.heard_at(sender.peer) + self._peers.bounds(sender.peer, self._slo).lost_after_s
        return min(sender.offered_at + self._room_s, max(sender.offered_at + answer_s, silent_at))
