"""What the adapters to the brokers counted, as metrics."""

from collections.abc import Callable, Mapping

from common.runtime.metrics import Metrics


def show_adapter_metrics(metrics: Metrics, *, broker: Callable[[], Mapping[str, int]], store: Callable[[], Mapping[str, int]]) -> None:
    """One counter an adapter, with what it counted as the label."""
    for name, help_text, counts in (
        ("segue_broker_total", "Messages, losses and errors at this process's broker connection.", broker),
        ("segue_store_total", "Operations, errors and conflicts at this process's store connection.", store),
    ):
        family = metrics.counter(name, help_text, ("kind",))
        for kind in counts():
            family.series(kind).follow(lambda counts=counts, kind=kind: counts()[kind])  # type: ignore[misc]
