"""What the parts of a gateway's machine share: who it is, the workers that it knows, the requests that it owns, its effects."""

from collections import Counter
from collections.abc import Iterator

from common.mesh.gateway_effects import GatewayEffect
from common.mesh.gateway_request import GatewayRequest
from common.mesh.worker_registry import WorkerRegistry
from common.policy.watchdog import WatchdogBounds
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

    def bounds(self, worker: WorkerId) -> WatchdogBounds:
        return self.registry.bounds(worker, self.slo)
