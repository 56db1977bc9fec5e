"""Where the sequences of a worker go that takes no new work: by the ordinary hand-off, under the same attempt, to a peer that
decodes; what has no blocks, or what no peer takes, goes back to its gateway, which places it again.

While no other worker of the group is ready, everything stays and ends here.
"""

from collections.abc import Collection

from common.mesh.worker_registry import WorkerRegistry
from common.policy.routing import decode_wait
from common.policy.worker_outlook import PendingLoad
from common.protocol.messages import Snapshot
from common.values.ids import WorkerId
from common.values.worker import Role, WorkerSnapshot


class Evacuation:
    """One per worker: what it hears of the others, which it keeps in `others`, and whether it is leaving."""

    def __init__(self, worker: WorkerId, others: WorkerRegistry) -> None:
        self._worker = worker
        self._others = others
        self._leavers: set[WorkerId] = set()
        self.leaving = False

    def on_snapshot(self, message: Snapshot, now: float) -> None:
        """Of another worker of the group."""
        self._others.observe(message.snapshot, now, gone=message.gone)
        if message.gone or message.snapshot.state == "draining":
            self._leavers.add(message.snapshot.worker)
        else:
            self._leavers.discard(message.snapshot.worker)

    def announced_leave(self, worker: WorkerId) -> bool:
        """Whether that worker said that it goes: its end is no loss."""
        return worker in self._leavers

    def on_tick(self, now: float) -> None:
        self._others.expire(now)

    @property
    def has_somewhere_to_go(self) -> bool:
        return any(True for _ in self._ready())

    def role_is_served(self, role: Role) -> bool:
        """Whether another worker has that role, by itself or among others."""
        return any(s.role in (role, "both") for s in self._ready())

    def target(
        self,
        joined: Collection[WorkerId],
        tried: Collection[WorkerId],
        role: Role | None = None,
        *,
        only: WorkerId | None = None,
    ) -> WorkerId | None:
        """The least loaded peer that can take a running sequence: one that has the `role`, or any, one that decodes first. Or
        `only` that one, whatever its role."""
        able = [s for s in self._ready() if s.worker in joined and s.worker not in tried and only in (None, s.worker)]
        peers = [s for s in able if role is None or only is not None or s.role == role]
        if role is not None and not peers:
            peers = [s for s in able if s.role == "both"]
        if not peers:
            return None
        chosen = min(peers, key=lambda s: (s.role == "prefill", decode_wait(s, self._others.pending), s.worker)).worker
        self._others.dispatched(chosen, PendingLoad(sequences=1))
        return chosen

    def _ready(self) -> list[WorkerSnapshot]:
        return [s for s in self._others.all() if s.state == "ready" and s.worker != self._worker]
