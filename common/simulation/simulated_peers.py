"""What a worker's shell knows of its peers: whom to dial, who has joined, whose silence means that it is gone.

The same rules as the shell that runs over sockets: the lower id dials when the other is announced, messages that come before
the KV link is open wait, a newer connection of one worker replaces the older, silence of five seconds ends one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from common.mesh.worker import WorkerCore
from common.policy.watchdog import peer_silent_after_s
from common.protocol.messages import ControlMessage, decode_control, encode
from common.simulation.shadow_kv import ShadowKv
from common.simulation.simulated_connections import Connection, SimulatedConnections
from common.simulation.simulated_process import SimulatedProcess
from common.values.ids import Incarnation, WorkerId
from common.values.worker import WorkerSnapshot

SILENT_PEER_S = peer_silent_after_s(step_s=0.0)
OWN_PAUSE_S = 2.5
REDIAL_S = 0.2


@dataclass(slots=True, eq=False)
class _Peer:
    worker: WorkerId
    incarnation: Incarnation
    connection: Connection
    kv: ShadowKv
    heard_at: float
    joined: bool = False
    waiting: list[ControlMessage] = field(default_factory=list)


class SimulatedPeers:
    """One per life of a worker. `identity_of` gives a peer's present incarnation and pool: what its hello would say."""

    def __init__(
        self,
        worker: WorkerId,
        process: SimulatedProcess,
        network: SimulatedConnections,
        core: WorkerCore,
        identity_of: Callable[[WorkerId], tuple[Incarnation, ShadowKv]],
        after_event: Callable[[], None],
    ) -> None:
        self._me = worker
        self._process = process
        self._network = network
        self._core = core
        self._identity_of = identity_of
        self._after_event = after_event
        self._peers: dict[WorkerId, _Peer] = {}
        self._dialling: set[WorkerId] = set()
        self._looked_at = process.around.now

    def joined(self) -> dict[str, str]:
        return {str(worker): peer.connection.tier for worker, peer in self._peers.items() if peer.joined}

    def link(self, worker: WorkerId) -> tuple[Connection, ShadowKv] | None:
        peer = self._peers.get(worker)
        return None if peer is None else (peer.connection, peer.kv)

    def announced(self, snapshot: WorkerSnapshot) -> None:
        worker = snapshot.worker
        known = self._peers.get(worker)
        connected = known is not None and known.incarnation == snapshot.incarnation
        if self._me < worker and not connected and worker not in self._dialling:
            self._dialling.add(worker)
            self._network.dial(self._me, worker, partial(self._refused, worker))

    def _refused(self, worker: WorkerId) -> None:
        self._process.after(REDIAL_S, "dial", partial(self._dialling.discard, worker))

    def on_connected(self, connection: Connection) -> None:
        worker = connection.peer_of(self._me)
        self._dialling.discard(worker)
        previous = self._peers.get(worker)
        if previous is not None:
            self._lose(previous, "a newer connection")
        incarnation, kv = self._identity_of(worker)
        peer = _Peer(worker, incarnation, connection, kv, self._now())
        self._peers[worker] = peer
        around = self._process.around
        self._process.after(around.takes(0.005), "link", partial(self._link_open, peer))

    def _link_open(self, peer: _Peer) -> None:
        if self._peers.get(peer.worker) is not peer:
            return
        peer.joined = True
        self._process.around.note(self._me, f"{peer.worker} joined, {peer.connection.tier}")
        self._core.on_peer_joined(peer.worker)
        waiting, peer.waiting = peer.waiting, []
        for message in waiting:
            self._core.on_control(peer.worker, message, self._now())
        self._after_event()

    def send(self, worker: WorkerId, message: ControlMessage) -> None:
        peer = self._peers.get(worker)
        if peer is not None:
            self._process.around.note(self._me, f"-> {worker}: {message!r}")
            self._network.send(peer.connection, self._me, encode(message))

    def on_payload(self, connection: Connection, payload: bytes) -> None:
        peer = self._peers.get(connection.peer_of(self._me))
        if peer is None or peer.connection is not connection:
            return
        peer.heard_at = self._now()
        message = decode_control(payload)
        self._process.around.counts[type(message).__name__] += 1
        if not peer.joined:
            peer.waiting.append(message)
            return
        self._core.on_control(peer.worker, message, self._now())
        self._after_event()

    def on_connection_end(self, connection: Connection) -> None:
        peer = self._peers.get(connection.peer_of(self._me))
        if peer is not None and peer.connection is connection:
            self._lose(peer, "the connection ended")

    def drop_silent(self) -> None:
        """Once a second. Where this round itself comes late, we were the frozen one."""
        now = self._now()
        late = now - self._looked_at > OWN_PAUSE_S
        self._looked_at = now
        for peer in list(self._peers.values()):
            if late:
                peer.heard_at = now
            elif now - peer.heard_at > SILENT_PEER_S:
                self._lose(peer, "silent")

    def _lose(self, peer: _Peer, reason: str) -> None:
        self._process.around.note(self._me, f"loses {peer.worker}: {reason}")
        del self._peers[peer.worker]
        self._network.end(peer.connection, by=self._me)
        if peer.joined:
            self._core.on_peer_lost(peer.worker, self._now())
            self._after_event()

    def _now(self) -> float:
        return self._process.around.now
