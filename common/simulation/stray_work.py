"""Work that nobody wants any more: it may go on for a moment, but not for long while messages pass.

Frames of what is over tell a gateway that a cancel was lost; whoever sends them for many seconds was not told again.
"""

from common.protocol.messages import FrameEntry
from common.values.errors import InvariantBroken

MOST_S = 6.0
PAUSE_S = 1.0


class StrayWork:
    """One per life of a gateway. A pause between frames (somebody was away) starts the time anew."""

    def __init__(self) -> None:
        self._heard: dict[tuple[str, str, str, int, int], tuple[float, float]] = {}

    def heard(self, worker: str, incarnation: str, entry: FrameEntry, now: float) -> None:
        key = (worker, incarnation, entry.request_id, entry.choice, entry.attempt)
        since, last = self._heard.get(key, (now, now))
        if now - last > PAUSE_S:
            since = now
        self._heard[key] = (since, now)
        if now - since > MOST_S:
            raise InvariantBroken(f"{worker} still runs {entry.request_id}, which was over {now - since:.1f} s ago")
