"""Streams that will be handed to a decode worker once their prompts are computed: it does not know of them yet, so no snapshot
of its own tells."""

from common.policy.worker_outlook import PendingLoad
from common.values.ids import RequestId, WorkerId


class PromisedLoads:
    """One promise a request at most; kept until its first token, when the decode worker has it."""

    def __init__(self) -> None:
        self._promises: dict[RequestId, tuple[WorkerId, PendingLoad]] = {}
        self._on: dict[WorkerId, PendingLoad] = {}

    def __len__(self) -> int:
        return len(self._promises)

    def promise(self, request: RequestId, worker: WorkerId, load: PendingLoad) -> None:
        self.settle(request)
        self._promises[request] = (worker, load)
        self._on[worker] = self.on(worker) + load

    def settle(self, request: RequestId) -> None:
        promised = self._promises.pop(request, None)
        if promised is None:
            return
        worker, load = promised
        left = self._on[worker] - load
        if left == PendingLoad():
            del self._on[worker]
        else:
            self._on[worker] = left

    def on(self, worker: WorkerId) -> PendingLoad:
        return self._on.get(worker, PendingLoad())
