"""Which blocks a peer may pull: the reservations that this worker granted.

Only the tiers that serve messages ask; on the mapped tier the generations alone fence. Granting and revoking happen on the
event loop, asking in the copy thread: each reservation's blocks are an immutable mapping that is replaced whole.
"""

from collections.abc import Mapping
from types import MappingProxyType

from common.values.ids import ReservationId

_NOTHING: Mapping[int, int] = MappingProxyType({})


class KvGrants:
    """Reservation → block → generation."""

    def __init__(self) -> None:
        self._granted: dict[ReservationId, Mapping[int, int]] = {}

    def grant(self, reservation: ReservationId, blocks: Mapping[int, int]) -> None:
        self._granted[reservation] = MappingProxyType({**self._granted.get(reservation, _NOTHING), **blocks})

    def revoke(self, reservation: ReservationId) -> None:
        self._granted.pop(reservation, None)

    def granted(self, reservation: ReservationId) -> Mapping[int, int]:
        return self._granted.get(reservation, _NOTHING)

    def __len__(self) -> int:
        return len(self._granted)
