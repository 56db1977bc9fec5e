"""Nothing new is admitted while the broker or the state store is away; running requests go on without them."""

from common.policy.outage import Outage
from common.values.errors import BrokerUnavailable, SegueError, StoreUnavailable


class Admission:
    """Told how broker and store fare; refuses with a 503 whose Retry-After follows from how long they have been away."""

    def __init__(self) -> None:
        self._broker = Outage()
        self._store = Outage()

    def check(self, *, broker_connected: bool, now: float) -> None:
        """Raises BrokerUnavailable or StoreUnavailable."""
        self.observe_broker(connected=broker_connected, now=now)
        if self._broker.since is not None:
            raise BrokerUnavailable("the message broker is away", retry_after_s=self._broker.retry_after_s(now))
        if self._store.refuses(now):
            raise StoreUnavailable("the state store is away", retry_after_s=self._store.retry_after_s(now))

    def observe_broker(self, *, connected: bool, now: float) -> None:
        if connected:
            self._broker.worked()
        else:
            self._broker.failed(now)

    def observe_store(self, *, works: bool, now: float) -> None:
        if works:
            self._store.worked()
        else:
            self._store.failed(now)

    def told(self, error: SegueError, now: float) -> SegueError:
        """The error as the client gets it: with the wait computed from the outage."""
        match error:
            case StoreUnavailable():
                return StoreUnavailable(str(error), retry_after_s=self._store.retry_after_s(now))
            case BrokerUnavailable():
                return BrokerUnavailable(str(error), retry_after_s=self._broker.retry_after_s(now))
            case _:
                return error
