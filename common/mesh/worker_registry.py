"""The workers that a gateway knows, from their snapshots: grouped by model, forgotten when they fall silent."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.policy.prefix_view import PrefixView
from common.policy.step_time import StepTime
from common.policy.watchdog import LEAST_LOST_S, WatchdogBounds, stream_bounds
from common.policy.worker_outlook import PendingLoad, snapshot_time
from common.values.cache_page import CachePage
from common.values.ids import Incarnation, ModelKey, WorkerId
from common.values.slo import Slo
from common.values.worker import WorkerSnapshot

SILENT_AFTER_S = 3.0
OWN_PAUSE_S = 2.5
GAP_MEMORY_S = 30.0
MOST_GAP_S = 1.5
"""A longer pause was a freeze, not the breath of a busy host: it says nothing about the next one, and widens no bound."""
MAX_HEARD = 4096


@dataclass(slots=True)
class _Heard:
    """Kept of a worker while it is forgotten: when it was heard last, and the longest pause before that, which fades."""

    at: float
    gap_s: float = 0.0
    incarnation: Incarnation | None = None


class WorkerRegistry:
    """Load that this gateway has dispatched and no snapshot shows yet is kept beside the snapshots."""

    def __init__(self) -> None:
        self._snapshots: dict[WorkerId, WorkerSnapshot] = {}
        self._observed_at: dict[WorkerId, float] = {}
        self._times: dict[WorkerId, StepTime] = {}
        self.pending: dict[WorkerId, PendingLoad] = {}
        self.prefixes = PrefixView()
        self._expired_at = -math.inf
        self._heard: dict[WorkerId, _Heard] = {}

    def heard(self, worker: WorkerId, now: float) -> None:
        """Anything at all came from that worker."""
        known = self._heard.get(worker)
        if known is None:
            if len(self._heard) >= MAX_HEARD:
                self._heard.pop(next(iter(self._heard)))
            self._heard[worker] = _Heard(now)
            return
        pause = now - known.at
        shown = pause if pause <= MOST_GAP_S else 0.0
        known.gap_s = max(shown, known.gap_s * max(0.0, 1.0 - pause / GAP_MEMORY_S))
        known.at = now

    def heard_at(self, worker: WorkerId) -> float:
        """When it was heard last in any way."""
        known = self._heard.get(worker)
        return -math.inf if known is None else known.at

    def silence(self, worker: WorkerId, now: float) -> float:
        """Seconds since it was heard in any way."""
        return now - self.heard_at(worker)

    def bounds(self, worker: WorkerId, slo: Slo) -> WatchdogBounds:
        known, snapshot = self._heard.get(worker), self._snapshots.get(worker)
        step_s = 0.0 if snapshot is None else snapshot.seconds_per_step
        return stream_bounds(slo, step_s=step_s, gap_s=0.0 if known is None else known.gap_s)

    def silent(self, slo: Slo, now: float) -> set[WorkerId]:
        """Workers that are known and were not heard for their bound: frozen perhaps, and no choice while there are others."""
        quiet = [worker for worker in self._snapshots if self.silence(worker, now) > LEAST_LOST_S]
        return {worker for worker in quiet if self.silence(worker, now) > self.bounds(worker, slo).lost_after_s}

    def observe(self, snapshot: WorkerSnapshot, now: float, *, gone: bool = False) -> None:
        """Take a snapshot; older ones of the same incarnation are ignored."""
        heard = self._heard.get(snapshot.worker)
        if heard is not None and heard.incarnation not in (None, snapshot.incarnation):
            del self._heard[snapshot.worker]  # between two lives lies no pause
        self.heard(snapshot.worker, now)
        self._heard[snapshot.worker].incarnation = snapshot.incarnation
        known = self._snapshots.get(snapshot.worker)
        if known is not None and known.incarnation == snapshot.incarnation:
            if snapshot.sequence_number < known.sequence_number:
                return
        elif gone:
            return
        self.pending.pop(snapshot.worker, None)
        if gone:
            self.forget(snapshot.worker)
            return
        self._snapshots[snapshot.worker] = snapshot
        self._times.pop(snapshot.worker, None)
        self._observed_at[snapshot.worker] = now

    def observe_cache(self, snapshot: WorkerSnapshot, page: CachePage | None, now: float) -> bool:
        """True: ask the worker for all that its prefix cache holds. Only what a known worker tells is kept."""
        known = self._snapshots.get(snapshot.worker)
        if page is None or known is None or known.incarnation != snapshot.incarnation:
            return False
        return self.prefixes.observe(snapshot.worker, snapshot.incarnation, page, now)

    def cached_tokens(self, model: ModelKey, prompt: Sequence[int], salt: bytes) -> dict[WorkerId, int]:
        """How much of a prompt each worker holds already."""
        return self.prefixes.overlaps({s.worker: s.fingerprint for s in self.group(model)}, prompt, salt)

    def expire(self, now: float) -> None:
        """Forget workers that fell silent. Called about once a second: a longer pause was our own silence, not theirs."""
        paused = now - self._expired_at > OWN_PAUSE_S
        self._expired_at = now
        if paused:
            self.refresh(now)
            return
        for worker, observed_at in list(self._observed_at.items()):
            if now - observed_at > SILENT_AFTER_S:
                self.forget(worker)

    def refresh(self, now: float) -> None:
        """The broker was away: nobody could be heard, so nobody was silent."""
        self._observed_at = dict.fromkeys(self._observed_at, now)
        for heard in self._heard.values():
            heard.at = now

    def dispatched(self, worker: WorkerId, load: PendingLoad) -> None:
        self.pending[worker] = self.pending.get(worker, PendingLoad()) + load

    def get(self, worker: WorkerId) -> WorkerSnapshot | None:
        return self._snapshots.get(worker)

    def step_time(self, snapshot: WorkerSnapshot) -> StepTime:
        """That of a known worker, worked out once a snapshot."""
        time = self._times.get(snapshot.worker)
        if time is None:
            time = self._times[snapshot.worker] = snapshot_time(snapshot)
        return time

    def all(self) -> Iterable[WorkerSnapshot]:
        return self._snapshots.values()

    def group(self, model: ModelKey) -> list[WorkerSnapshot]:
        return [s for s in self._snapshots.values() if s.model == model]

    def models(self) -> list[ModelKey]:
        """Models that at least one ready worker serves."""
        return sorted({s.model for s in self._snapshots.values() if s.state == "ready"})

    def forget(self, worker: WorkerId) -> None:
        """A worker is taken for lost until it is heard again."""
        self._snapshots.pop(worker, None)
        self._times.pop(worker, None)
        self._observed_at.pop(worker, None)
        self.pending.pop(worker, None)
        self.prefixes.forget(worker)
