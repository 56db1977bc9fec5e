"""What a gateway tells workers to end: sequences that nobody wants any more, and strays that should not run."""

from common.mesh.cancel_memory import CancelMemory
from common.mesh.gateway_effects import SendCancel
from common.mesh.gateway_ledger import GatewayLedger
from common.mesh.gateway_request import GatewayRequest
from common.protocol.messages import Cancel, FrameEntry
from common.values.ids import RequestId, WorkerId


class GatewayCancels:
    """Before `strays_from` frames may come that a gateway of this id asked for which has died: its requests are adopted,
    or their workers end them."""

    def __init__(self, ledger: GatewayLedger, *, strays_from: float) -> None:
        self._ledger = ledger
        self._memory = CancelMemory()
        self._strays_from = strays_from

    def cancel_workers(self, request: GatewayRequest, choices: list[int] | None, now: float) -> None:
        """Choices (None: all) of the present attempt, wherever it may be."""
        cancel = Cancel(request_id=request.request_id, attempt=request.attempt, choices=choices, epoch=request.epoch)
        for worker in sorted(request.involved):
            self._send(worker, cancel, now)

    def cancel_stray(self, worker: WorkerId, entry: FrameEntry, choices: list[int] | None, now: float) -> None:
        """A frame of a dead attempt, or of what is over: its sequence should not run. Where the worker was told just now,
        or the sequence has ended there, that is no surprise."""
        request_id = RequestId(entry.request_id)
        if entry.new.ending is not None or not self._memory.is_due(request_id, worker, now):
            return
        request = self._ledger.requests.get(request_id)
        if request is None and now < self._strays_from and not self._memory.was_ours(request_id):
            return
        self._ledger.counters["stray_frames"] += 1
        epoch = self._memory.epoch(request_id, worker) if request is None else request.epoch
        self._send(worker, Cancel(request_id=entry.request_id, attempt=entry.attempt, choices=choices, epoch=epoch), now)

    def left_alone(self, request: GatewayRequest, now: float) -> None:
        """The request is another gateway's now: its workers are to be told nothing more in our name."""
        for worker in request.involved:
            self._memory.told(request.request_id, worker, now, epoch=request.epoch)
        self.over(request)

    def over(self, request: GatewayRequest) -> None:
        self._memory.over(request.request_id)

    def _send(self, worker: WorkerId, cancel: Cancel, now: float) -> None:
        self._memory.told(RequestId(cancel.request_id), worker, now, epoch=cancel.epoch)
        self._ledger.emit(SendCancel(worker=worker, cancel=cancel))
