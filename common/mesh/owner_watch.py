"""Which gateways have fallen silent for good: nobody reads their tokens any more.

Silence counts from a gateway's last beat, or from when it was first seen as an owner, and only while our own broker answers.
Beats name the incarnation: a gateway that came back under its old id owns nothing of what it had before.
"""

from collections.abc import Iterable

from common.values.ids import GatewayId, Incarnation, Owner

SILENT_FOR_S = 30.0
_Life = tuple[GatewayId, Incarnation]


class OwnerWatch:
    """Remembers a gateway for as long as it beats or owns something."""

    def __init__(self) -> None:
        self._heard_at: dict[_Life, float] = {}

    def beat(self, gateway: GatewayId, incarnation: Incarnation, now: float) -> None:
        self._heard_at[gateway, incarnation] = now

    def refresh(self, now: float) -> None:
        """The broker was away, or we were: nobody could be heard."""
        self._heard_at = dict.fromkeys(self._heard_at, now)

    def lost(self, owners: Iterable[Owner], now: float) -> list[Owner]:
        """Those of `owners` that have been silent for too long. Call it about once a second with all owners there are."""
        lost = []
        owning = set()
        for owner in owners:
            life = (owner.gateway, owner.incarnation)
            owning.add(life)
            if now - self._heard_at.setdefault(life, now) > SILENT_FOR_S:
                lost.append(owner)
        for life, heard_at in list(self._heard_at.items()):
            if life not in owning and now - heard_at > SILENT_FOR_S:
                del self._heard_at[life]
        return lost
