"""Attaches of one request wait for each other, as at the product's gateways: two that adopted it at once would cut each other off."""

from collections import deque
from collections.abc import Callable

from common.values.ids import RequestId


class OneAtATime:
    def __init__(self) -> None:
        self._waiting: dict[RequestId, deque[Callable[[], None]]] = {}

    def ask(self, request_id: RequestId, act: Callable[[], None]) -> None:
        """`act` happens now, or once those before it were answered."""
        if request_id in self._waiting:
            self._waiting[request_id].append(act)
        else:
            self._waiting[request_id] = deque()
            act()

    def answered(self, request_id: RequestId) -> None:
        waiting = self._waiting[request_id]
        if waiting:
            waiting.popleft()()
        else:
            del self._waiting[request_id]
