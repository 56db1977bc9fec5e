"""When each worker was last told to end a request, so that frames which were under way meanwhile are not answered each.

A cancel can be lost with the broker's connection. Frames that still come a second after it say so, and are answered with
another.
"""

from collections import OrderedDict

from common.values.ids import RequestId, WorkerId

UNDER_WAY_S = 1.0
MAX_REMEMBERED = 16384


class CancelMemory:
    """One per gateway, bounded: the oldest are forgotten first, which costs a cancel too many."""

    def __init__(self) -> None:
        self._told: OrderedDict[tuple[RequestId, WorkerId], tuple[float, int]] = OrderedDict()
        self._over: OrderedDict[RequestId, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._told)

    def told(self, request: RequestId, worker: WorkerId, now: float, *, epoch: int) -> None:
        """`epoch` is the one in which the request was ours: with a lower one a repetition would be ignored."""
        self._told[request, worker] = (now, epoch)
        self._told.move_to_end((request, worker))
        if len(self._told) > MAX_REMEMBERED:
            self._told.popitem(last=False)

    def is_due(self, request: RequestId, worker: WorkerId, now: float) -> bool:
        """Whether a frame of what is over here deserves a cancel now."""
        told = self._told.get((request, worker))
        return told is None or now - told[0] > UNDER_WAY_S

    def epoch(self, request: RequestId, worker: WorkerId) -> int:
        """The epoch of what was said last; 1 where that is not known."""
        told = self._told.get((request, worker))
        return 1 if told is None else told[1]

    def over(self, request: RequestId) -> None:
        """The request ran here, and does no more."""
        self._over[request] = None
        if len(self._over) > MAX_REMEMBERED:
            self._over.popitem(last=False)

    def was_ours(self, request: RequestId) -> bool:
        """Whether it ran in this life of the gateway, as far as that is remembered."""
        return request in self._over
