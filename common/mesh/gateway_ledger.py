"""What the parts of a gateway's machine share: who it is, the workers that it knows, the requests that it owns, its effects."""

from collections import Counter
from collections.abc import Iterator

from common.mesh.gateway_effects import GatewayEffect
from common.mesh.gateway_request import GatewayRequest
from common.mesh.gateway_service import GatewayService
from common.mesh.promised_load import PromisedLoads
from common.mesh.worker_registry import WorkerRegistry
from common.policy.watchdog import WatchdogBounds
from common.policy.worker_outlook import PendingLoad, WorkerOutlook, outlook_of
from common.values.ids import GatewayId, Incarnation, RequestId, WorkerId
from common.values.slo import Slo


class GatewayLedger:
    """Holds, and decides nothing."""

    def __init__(self, *, gateway: GatewayId, incarnation: Incarnation, slo: Slo) -> None:
        self.gateway = gateway
        self.incarnation = incarnation
        self.slo = slo
        self.registry = WorkerRegistry()
        self.counters: Counter[str] = Counter()
        self.requests: dict[RequestId, GatewayRequest] = {}
        self.effects: list[GatewayEffect] = []
        self.promised = PromisedLoads()
        self.service = GatewayService()

    def emit(self, effect: GatewayEffect) -> None:
        self.effects.append(effect)

    def current(self, request_id: RequestId, attempt: int) -> GatewayRequest | None:
        """The request, while that attempt is its present one."""
        request = self.requests.get(request_id)
        return request if request is not None and request.attempt == attempt else None

    def following(self, worker: WorkerId) -> Iterator[GatewayRequest]:
        """Requests of which an unfinished choice is at that worker. What is done to one may end others meanwhile."""
        for request in list(self.requests.values()):
            if any(request.source.get(stream.choice) == worker for stream in request.unfinished()):
                yield request

    def outlooks(self, request: GatewayRequest) -> list[WorkerOutlook]:
        """The workers of the request's model, with what was sent to them and no snapshot shows yet."""
        registry = self.registry
        cached = registry.cached_tokens(request.model, request.prompt, request.salt)
        return [
            outlook_of(snapshot, self._pending(snapshot.worker), cached.get(snapshot.worker, 0), registry.step_time(snapshot))
            for snapshot in registry.group(request.model)
        ]

    def _pending(self, worker: WorkerId) -> PendingLoad:
        return self.registry.pending.get(worker, PendingLoad()) + self.promised.on(worker)

    def bounds(self, worker: WorkerId) -> WatchdogBounds:
        return self.registry.bounds(worker, self.slo)
