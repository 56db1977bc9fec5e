"""What requests came to a gateway lately, for whoever plans roles: how many of each model, and what some of them are like."""

import math
from collections import deque

from common.mesh.gateway_request import GatewayRequest
from common.protocol.messages import MAX_SEEN, ModelArrivals, SeenArrival
from common.values.ids import ModelKey

MAX_MODELS = 64


class ArrivalLedger:
    """Counts go up for as long as the gateway lives, so that a lost message loses no request; the samples of each model are of the
    last ones since `take`. Models beyond the bound are not told of."""

    def __init__(self) -> None:
        self._arrived: dict[ModelKey, int] = {}
        self._seen: dict[ModelKey, deque[SeenArrival]] = {}

    def note(self, request: GatewayRequest, output_tokens: float) -> None:
        """A new request, taken or refused: both were wanted. One whose objectives are not known yet only counts."""
        if request.model not in self._arrived and len(self._arrived) >= MAX_MODELS:
            return
        self._arrived[request.model] = self._arrived.get(request.model, 0) + 1
        objectives = request.objectives
        if objectives is None:
            return
        seen = self._seen.setdefault(request.model, deque(maxlen=MAX_SEEN))
        seen.append(
            SeenArrival(
                prompt_tokens=len(request.prompt),
                output_tokens=max(1, math.ceil(output_tokens)),
                ttft_s=objectives.ttft_for(request.unloaded_s),
                tpot_s=objectives.tpot_s,
            )
        )

    def take(self) -> list[ModelArrivals]:
        arrivals = [
            ModelArrivals(model=model, arrived=count, seen=list(self._seen.get(model, ()))) for model, count in self._arrived.items()
        ]
        self._seen.clear()
        return arrivals
