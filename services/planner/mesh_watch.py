"""What the planner hears of the mesh, put together into one view a model. Pure: messages and `now` in, views out."""

from collections import deque
from collections.abc import Iterable

from common.mesh.worker_registry import WorkerRegistry
from common.policy.role_view import MeshView, SeenRequest, WorkerView
from common.policy.step_time_coefficients import step_time_of
from common.protocol.messages import GatewayLoad, Snapshot
from common.values.ids import ModelKey, WorkerId
from common.values.worker import Role, WorkerSnapshot

MOST_SEEN = 256
SILENT_GATEWAY_S = 10.0
UNANSWERED_S = 5.0
"""After that a role change that no snapshot shows counts as lost."""


class MeshWatch:
    """`changed` is told of each role change that was sent: until the worker's snapshots show its number, it is changing."""

    def __init__(self) -> None:
        self._registry = WorkerRegistry()
        self._arrived: dict[tuple[str, ModelKey], int] = {}
        self._heard: dict[str, tuple[float, bool]] = {}
        self._fresh: dict[ModelKey, int] = {}
        self._seen: dict[ModelKey, deque[SeenRequest]] = {}
        self._viewed_at: dict[ModelKey, float] = {}
        self._sent: dict[WorkerId, tuple[int, float]] = {}
        self.lost_changes = 0

    def on_snapshot(self, message: Snapshot, now: float) -> None:
        self._registry.observe(message.snapshot, now, gone=message.gone)

    def on_load(self, load: GatewayLoad, now: float) -> None:
        """Counts only rise: what a lost message would have said, the next one does. A gateway that is new to us begins at zero, for
        us: nobody knows when its requests came."""
        name = f"{load.gateway}/{load.incarnation}"
        known = name in self._heard
        self._heard[name] = (now, load.free)
        for each in load.models:
            before = self._arrived.get((name, each.model), 0 if known else each.arrived)
            self._arrived[name, each.model] = each.arrived
            self._fresh[each.model] = self._fresh.get(each.model, 0) + max(0, each.arrived - before)
            seen = self._seen.setdefault(each.model, deque(maxlen=MOST_SEEN))
            seen.extend(
                SeenRequest(prompt_tokens=r.prompt_tokens, output_tokens=r.output_tokens, ttft_s=r.ttft_s, tpot_s=r.tpot_s)
                for r in each.seen
                if r.ttft_s > 0.0 and r.tpot_s > 0.0
            )

    def changed(self, worker: WorkerId, number: int, now: float) -> None:
        self._sent[worker] = (number, now)

    def next_change(self) -> int:
        """A number above any that a worker has taken or was sent."""
        taken = max((snapshot.role_decision for snapshot in self._registry.all()), default=0)
        return 1 + max([taken, *(number for number, _ in self._sent.values())])

    @property
    def workers(self) -> Iterable[WorkerSnapshot]:
        return self._registry.all()

    def on_tick(self, now: float) -> None:
        self._registry.expire(now)
        for name in [name for name, (at, _) in self._heard.items() if now - at > SILENT_GATEWAY_S]:
            del self._heard[name]
            self._arrived = {key: count for key, count in self._arrived.items() if key[0] != name}
        for worker, (number, sent_at) in list(self._sent.items()):
            snapshot = self._registry.get(worker)
            if snapshot is not None and snapshot.role_decision >= number:
                del self._sent[worker]
            elif now - sent_at > UNANSWERED_S:
                del self._sent[worker]
                self.lost_changes += 1

    def refresh(self, now: float) -> None:
        """The broker was away: nobody could be heard."""
        self._registry.refresh(now)

    def views(self, now: float) -> dict[ModelKey, MeshView]:
        """Of each model with workers whose step times are known. What was told since the last views is told once."""
        free = any(free for _, free in self._heard.values())
        views = {}
        for model in self._registry.models():
            ready = sorted((s for s in self._registry.group(model) if s.state == "ready"), key=lambda s: s.worker)
            measured = next((s.step_time for s in ready if s.step_time is not None), None)
            if measured is None:
                continue
            views[model] = MeshView(
                now=now,
                seconds=now - self._viewed_at.get(model, now),
                arrived=self._fresh.pop(model, 0),
                seen=tuple(self._seen.pop(model, ())),
                workers=tuple(self._worker(snapshot) for snapshot in ready),
                step_time=step_time_of(measured),
                transfer_base_s=max(s.transfer_base_s for s in ready),
                transfer_per_token_s=max(s.transfer_per_token_s for s in ready),
                free=free,
            )
            self._viewed_at[model] = now
        return views

    def _worker(self, snapshot: WorkerSnapshot) -> WorkerView:
        role: Role = snapshot.role
        return WorkerView(
            worker=snapshot.worker,
            role=role,
            changing=snapshot.changing or snapshot.worker in self._sent,
            prefill_queue_s=snapshot.prefill_queue_s,
            decoding=snapshot.decoding,
            decoding_kv_tokens=snapshot.decoding_kv_tokens,
            tokens_left=snapshot.tokens_left,
            kv_tokens=snapshot.blocks_total * snapshot.fingerprint.layout.block_size,
            max_sequences=snapshot.max_num_seqs,
        )
