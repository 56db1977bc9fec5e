"""How long a server that requests depend on has been away, and what clients are told meanwhile. Pure: `now` is an argument."""

from dataclasses import dataclass

FIRST_RETRY_S = 1.0
LONGEST_RETRY_S = 30.0
PROBE_EVERY_S = 1.0


@dataclass(slots=True)
class Outage:
    """`since` is None while the server works. The wait that clients are told is as long again as the outage has lasted: a
    short one is soon over, and a long one is not met by everybody's retries at once."""

    since: float | None = None
    failed_at: float = 0.0

    def failed(self, now: float) -> None:
        self.since = now if self.since is None else self.since
        self.failed_at = now

    def worked(self) -> None:
        self.since = None

    def refuses(self, now: float) -> bool:
        """Whether to say no without asking: after two failures, one question a second finds out when the server is back."""
        return self.since is not None and self.failed_at > self.since and now - self.failed_at < PROBE_EVERY_S

    def retry_after_s(self, now: float) -> float:
        lasted = 0.0 if self.since is None else now - self.since
        return min(LONGEST_RETRY_S, max(FIRST_RETRY_S, lasted))
