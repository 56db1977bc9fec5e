"""Messages between this worker and its peers, counted on both sides: the list rule compares what was sent with what the peer
has handled."""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from common.mesh.worker_effects import SendControl, WorkerEffect
from common.protocol.messages import ControlMessage, Refuse
from common.values.ids import WorkerId


@dataclass(slots=True)
class PeerCounts:
    """Messages on the present connection."""

    sent: int = 0
    handled: int = 0


@dataclass(slots=True)
class HandoffCounters:
    """Totals since the start, by outcome and by the reason why a block could not be used."""

    settled: Counter[str] = field(default_factory=Counter)
    blocks: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    turned_away: Counter[str] = field(default_factory=Counter)


class PeerPost:
    """One per worker: the peers whose control connection is up."""

    def __init__(self, effects: list[WorkerEffect]) -> None:
        self.counters = HandoffCounters()
        self._effects = effects
        self._peers: dict[WorkerId, PeerCounts] = {}

    @property
    def peers(self) -> Collection[WorkerId]:
        return self._peers.keys()

    def counts(self) -> Iterable[tuple[WorkerId, PeerCounts]]:
        return self._peers.items()

    def joined(self, peer: WorkerId) -> None:
        self._peers[peer] = PeerCounts()

    def lost(self, peer: WorkerId) -> None:
        self._peers.pop(peer, None)

    def count_handled(self, peer: WorkerId) -> None:
        if peer in self._peers:
            self._peers[peer].handled += 1

    def sent_to(self, peer: WorkerId) -> int:
        return self._peers[peer].sent

    def send(self, peer: WorkerId, message: ControlMessage) -> None:
        """Every message to a peer goes this way, so that the list rule counts it; for a peer that is gone it is dropped."""
        counts = self._peers.get(peer)
        if isinstance(message, Refuse):
            self.counters.turned_away[message.reason] += 1
        if counts is not None:
            counts.sent += 1
            self._effects.append(SendControl(peer=peer, message=message))
