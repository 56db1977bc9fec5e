"""Messages that this process could not take, counted by reason."""

import logging
from collections import Counter
from typing import Literal

from common.values.errors import PeerError, WrongVersion

Reason = Literal["version", "malformed"]
REASONS: tuple[Reason, ...] = ("version", "malformed")
logger = logging.getLogger(__name__)


class MessageRefusals:
    """Each is counted; of each kind of message and reason the first is logged, for a peer of another release sends many."""

    def __init__(self) -> None:
        self.counts: Counter[Reason] = Counter()
        self._logged: set[tuple[str, Reason]] = set()

    def note(self, what: str, error: PeerError) -> None:
        """`what` names the kind of message, of a handful."""
        reason: Reason = "version" if isinstance(error, WrongVersion) else "malformed"
        self.counts[reason] += 1
        if (what, reason) not in self._logged:
            self._logged.add((what, reason))
            logger.warning("message_refused", extra={"fields": {"what": what, "reason": str(error)}})
