"""A worker's connections to the other workers of its group: one control connection and one KV link each.

Made when a worker is announced, not at the first request; the lower id dials. Both sides say hello, check that their KV
can pair, and open the KV link; only then is the peer joined. Messages that come meanwhile wait.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from common.ports.kv_transport import KvLink, KvTransport
from common.ports.peers import PeerConnection, PeerNetwork
from common.protocol.messages import ControlMessage, Hello, decode_control, encode
from common.runtime.message_refusals import MessageRefusals
from common.values.errors import PeerError
from common.values.ids import Incarnation, ReservationId, WorkerId
from common.values.transfer import BlockSource, PullOutcome
from common.values.worker import WorkerSnapshot

DIAL_TIMEOUT_S = 5.0
REDIAL_FIRST_S = 0.2
REDIAL_MOST_S = 5.0
OWN_PAUSE_S = 2.5
FORGET_AFTER_S = 10.0
MAX_WAITING = 4096
UNREACHABLE_PAUSE_S = 10.0
SETTLING_PEER_S = 60.0
"""A peer says nothing between its hello and the moment when it has mapped our region, which may take long on a busy machine."""
logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Peer:
    """One connection. `waiting` holds messages that came before the peer had joined; `talks` once it said more than hello;
    `dialled` is whom we called, who may not have said hello yet."""

    connection: PeerConnection
    heard_at: float
    dialled: WorkerId | None = None
    worker: WorkerId | None = None
    incarnation: Incarnation | None = None
    link: KvLink | None = None
    joined: bool = False
    talks: bool = False
    pulls: int = 0
    lost: bool = False
    waiting: list[ControlMessage] = field(default_factory=list)


class PeerLinks:
    """`tasks` is the service's task group. Callbacks run on the event loop: `on_joined`, `on_message` (in order), `on_lost`."""

    def __init__(
        self,
        *,
        hello: Hello,
        network: PeerNetwork,
        transport: KvTransport,
        tasks: asyncio.TaskGroup,
        strict_kernels: bool,
        refusals: MessageRefusals,
        on_joined: Callable[[WorkerId], None],
        on_message: Callable[[WorkerId, ControlMessage], None],
        on_lost: Callable[[WorkerId], None],
    ) -> None:
        self._hello = hello
        self._me = WorkerId(hello.worker)
        self._network = network
        self._transport = transport
        self._tasks = tasks
        self._strict_kernels = strict_kernels
        self._refusals = refusals
        self._on_joined = on_joined
        self._on_message = on_message
        self._on_lost = on_lost
        self._peers: dict[WorkerId, _Peer] = {}
        self._connections: set[_Peer] = set()
        self._announced: dict[WorkerId, WorkerSnapshot] = {}
        self._dialling: dict[WorkerId, asyncio.Task[None]] = {}
        self._tried: set[WorkerId] = set()
        self._tried_changed = asyncio.Event()
        self._heard: dict[WorkerId, float] = {}
        self._looked_at = -math.inf
        self._closing = False
        self.unpaired: dict[str, str] = {}

    async def listen(self) -> tuple[str, int]:
        return await self._network.listen(self._accepted)

    def tiers(self) -> dict[str, str]:
        """Joined peers with the tier that their KV comes over."""
        return {worker: peer.link.tier for worker, peer in self._peers.items() if peer.joined and peer.link is not None}

    def announced(self, snapshot: WorkerSnapshot, *, gone: bool) -> None:
        """Another worker of the group was heard on the broker."""
        worker = snapshot.worker
        if gone:
            self._announced.pop(worker, None)
            self._tried.discard(worker)
            self.unpaired.pop(worker, None)
            self._tried_changed.set()
            return
        self._heard[worker] = asyncio.get_running_loop().time()
        known = self._announced.get(worker)
        if known is not None and known.incarnation != snapshot.incarnation:
            self.unpaired.pop(worker, None)
        self._announced[worker] = snapshot
        calling = worker in self._dialling or any(peer.dialled == worker and peer.worker is None for peer in self._connections)
        due = self._me < worker and not calling and worker not in self.unpaired
        if due and not self._closing and not self._is_connected(worker, snapshot.incarnation):
            self._dialling[worker] = self._tasks.create_task(self._dial(worker), name=f"dial {worker}")

    async def wait_until_tried(self, *, settle_s: float, timeout_s: float) -> None:
        """Return once every announced peer was tried, after `settle_s` in which further ones could be announced."""
        await asyncio.sleep(settle_s)
        try:
            async with asyncio.timeout(timeout_s):
                while not set(self._announced) <= self._tried | set(self.unpaired):
                    self._tried_changed.clear()
                    await self._tried_changed.wait()
        except TimeoutError:
            untried = sorted(set(self._announced) - self._tried)
            logger.warning("peers_untried", extra={"fields": {"workers": ",".join(untried)}})

    def send(self, worker: WorkerId, message: ControlMessage) -> None:
        peer = self._peers.get(worker)
        if peer is not None and not peer.lost:
            peer.connection.send(encode(message))

    async def pull(self, worker: WorkerId, reservation: ReservationId, blocks: Sequence[BlockSource]) -> list[PullOutcome]:
        """One outcome a block, whatever happens."""
        peer = self._peers.get(worker)
        if peer is None or peer.link is None:
            return ["lost"] * len(blocks)
        peer.pulls += 1
        try:
            return await peer.link.pull(reservation, blocks)
        except PeerError as error:
            logger.warning("pull_failed", extra={"fields": {"peer": worker, "reason": str(error)}})
            return ["lost"] * len(blocks)
        finally:
            peer.pulls -= 1
            if peer.lost and not peer.pulls:
                self._tasks.create_task(peer.link.close(), name=f"close link {worker}")

    def drop_silent(self, now: float, silent_after_s: float) -> None:
        """Once a second. A peer sends something as often; one that does not is frozen, or cut off. Where this round itself
        comes late, we were the frozen one."""
        late = now - self._looked_at > OWN_PAUSE_S
        self._looked_at = now
        for worker, heard_at in list(self._heard.items()):
            if now - heard_at > FORGET_AFTER_S and not late:
                del self._heard[worker]
                self._announced.pop(worker, None)
                self._tried_changed.set()
        if late:
            for peer in self._connections:
                peer.heard_at = now
            return
        for peer in list(self._connections):
            limit = silent_after_s if peer.talks else SETTLING_PEER_S
            if now - peer.heard_at > limit and not peer.lost:
                self._lose(peer, f"silent for {limit:g} s")

    async def close(self) -> None:
        self._closing = True
        for dial in list(self._dialling.values()):
            dial.cancel()
        for peer in list(self._connections):
            peer.lost = True
            await peer.connection.close()
            if peer.link is not None and not peer.pulls:
                await peer.link.close()
        await self._network.close()

    # ------------------------------------------------------------------ private

    def _is_connected(self, worker: WorkerId, incarnation: Incarnation) -> bool:
        peer = self._peers.get(worker)
        return peer is not None and peer.incarnation == incarnation

    async def _dial(self, worker: WorkerId) -> None:
        pause = REDIAL_FIRST_S
        try:
            while not self._closing and worker not in self.unpaired:
                snapshot = self._announced.get(worker)
                if snapshot is None or self._is_connected(worker, snapshot.incarnation):
                    return
                try:
                    connection = await self._network.dial(snapshot.control_host, snapshot.control_port, timeout_s=DIAL_TIMEOUT_S)
                except PeerError as error:
                    logger.info("dial_failed", extra={"fields": {"peer": worker, "reason": str(error)}})
                    self._mark_tried(worker)
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, REDIAL_MOST_S)
                    continue
                self._accepted(connection, dialled=worker)
                return
        finally:
            self._dialling.pop(worker, None)

    def _accepted(self, connection: PeerConnection, *, dialled: WorkerId | None = None) -> None:
        peer = _Peer(connection, asyncio.get_running_loop().time(), dialled)
        self._connections.add(peer)
        connection.send(encode(self._hello))
        connection.listen(lambda payload: self._received(peer, payload), lambda reason: self._lose(peer, reason))

    def _received(self, peer: _Peer, payload: bytes) -> None:
        peer.heard_at = asyncio.get_running_loop().time()
        try:
            message = decode_control(payload)
            if peer.worker is None:
                if not isinstance(message, Hello):
                    raise PeerError(f"{type(message).__name__} before hello")
                self._said_hello(peer, message)
                return
            peer.talks = True
            if peer.joined:
                self._on_message(peer.worker, message)
            else:
                if len(peer.waiting) >= MAX_WAITING:
                    raise PeerError(f"more than {MAX_WAITING} messages before we had joined")
                peer.waiting.append(message)
        except PeerError as error:
            self._refusals.note("control", error)
            self._lose(peer, str(error))

    def _said_hello(self, peer: _Peer, hello: Hello) -> None:
        worker = WorkerId(hello.worker)
        peer.worker, peer.incarnation = worker, Incarnation(hello.incarnation)
        differs = "model" if hello.model != self._hello.model else None
        differs = differs or self._hello.fingerprint.differs_from(hello.fingerprint, strict_kernels=self._strict_kernels)
        if differs is not None:
            self.unpaired[worker] = differs
            self._mark_tried(worker)
            logger.warning("peer_unpaired", extra={"fields": {"peer": worker, "field": differs}})
            raise PeerError(f"its {differs} differs from ours")
        previous = self._peers.get(worker)
        if previous is not None and not previous.lost:
            self._lose(previous, "a newer connection of the same worker")
        self._peers[worker] = peer
        self._tasks.create_task(self._open_link(peer, worker, hello), name=f"link {worker}")

    async def _open_link(self, peer: _Peer, worker: WorkerId, hello: Hello) -> None:
        try:
            link = await self._transport.connect(hello.transport)
        except PeerError as error:
            self.unpaired[worker] = "transport"
            asyncio.get_running_loop().call_later(UNREACHABLE_PAUSE_S, self.unpaired.pop, worker, None)
            self._mark_tried(worker)
            self._lose(peer, f"no way to move KV: {error}")
            return
        if peer.lost:
            await link.close()
            return
        peer.link = link
        peer.joined = True
        logger.info("peer_joined", extra={"fields": {"peer": worker, "tier": link.tier, "address": peer.connection.address}})
        self._mark_tried(worker)
        self._on_joined(worker)
        waiting, peer.waiting = peer.waiting, []
        try:
            for message in waiting:
                if not peer.lost:
                    self._on_message(worker, message)
        except PeerError as error:
            self._lose(peer, str(error))

    def _lose(self, peer: _Peer, reason: str) -> None:
        if peer.lost:
            return
        peer.lost = True
        self._connections.discard(peer)
        self._tasks.create_task(peer.connection.close(), name="close connection")
        if peer.worker is None:
            return
        if self._peers.get(peer.worker) is peer:
            del self._peers[peer.worker]
        if peer.joined:
            logger.warning("peer_lost", extra={"fields": {"peer": peer.worker, "reason": reason}})
            self._on_lost(peer.worker)
        if peer.link is not None and not peer.pulls:
            self._tasks.create_task(peer.link.close(), name=f"close link {peer.worker}")

    def _mark_tried(self, worker: WorkerId) -> None:
        self._tried.add(worker)
        self._tried_changed.set()
