"""Laws of one life of a worker about who owns its requests: frames go to the highest epoch that has spoken, an old owner ends
nothing, and what nobody owns any more ends in time."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from common.mesh.owner_watch import SILENT_FOR_S
from common.mesh.worker import WorkerCore
from common.protocol.messages import Cancel, FrameEntry, ReplayEntry, ReplayItem
from common.protocol.token_log import SequenceLog
from common.simulation.random_requests import MOST_CHOICES
from common.values.errors import InvariantBroken
from common.values.ids import GatewayId, Incarnation, RequestId, SequenceKey, WorkerId

SLACK_S = 3.0


class OwnerLaws:
    def __init__(self, worker: WorkerId, core: WorkerCore) -> None:
        self.undisturbed_since = 0.0
        self._worker = worker
        self._core = core
        self._heard: dict[SequenceKey, tuple[SequenceLog, int, GatewayId]] = {}
        self._owned_since: dict[Incarnation, float] = {}

    def asked(self, items: Sequence[ReplayItem], answer: Iterable[ReplayEntry], gateway: GatewayId) -> None:
        """A gateway has asked for these."""
        for item, entry in zip(items, answer, strict=True):
            key = SequenceKey(RequestId(item.request_id), item.choice)
            log = self._core.token_log(key)
            if log is None or log.attempt != item.attempt:
                continue
            epoch = self._epoch(key)
            if item.epoch < epoch and entry.state != "adopted":
                raise InvariantBroken(f"{self._worker} answers an old owner of {item.request_id}")
            if item.epoch >= epoch:
                self._heard[key] = (log, item.epoch, gateway)

    def emitted(self, gateway: GatewayId, entries: Iterable[FrameEntry]) -> None:
        for entry in entries:
            key = SequenceKey(RequestId(entry.request_id), entry.choice)
            heard = self._heard.get(key)
            if heard is not None and heard[0] is self._core.token_log(key) and heard[2] != gateway:
                raise InvariantBroken(f"{self._worker} sends tokens of {key} to {gateway}, {heard[2]} owns it")

    def cancel_counts(self, cancel: Cancel) -> bool:
        logs = [self._core.token_log(key) for key in _keys(cancel)]
        return all(log is None or log.owner.epoch <= cancel.epoch for log in logs)

    @contextmanager
    def nothing_ends(self, cancel: Cancel) -> Iterator[None]:
        before = [(key, self._core.token_log(key)) for key in _keys(cancel)]
        yield
        if any(self._core.token_log(key) is not log for key, log in before):
            raise InvariantBroken(f"{self._worker}: a cancel of an old owner ended {cancel.request_id}")

    def check_lost(self, lost: Mapping[Incarnation, float], now: float) -> None:
        """Once a second, after the worker's own watch."""
        owning = {owner.incarnation for owner in self._core.owners()}
        self._owned_since = {owner: self._owned_since.get(owner, now) for owner in sorted(owning)}
        for owner, since in self._owned_since.items():
            if owner in lost and now - max(lost[owner], since, self.undisturbed_since) > SILENT_FOR_S + SLACK_S:
                raise InvariantBroken(f"{self._worker} still runs what {owner} left behind")

    def _epoch(self, key: SequenceKey) -> int:
        """The highest that has spoken for what is there now."""
        heard = self._heard.get(key)
        return heard[1] if heard is not None and heard[0] is self._core.token_log(key) else 0


def _keys(cancel: Cancel) -> list[SequenceKey]:
    return [SequenceKey(RequestId(cancel.request_id), choice) for choice in range(MOST_CHOICES)]
