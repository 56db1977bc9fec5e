"""Counters, gauges and histograms in the Prometheus text format, small enough to sit on the token path.

A `Metrics` object belongs to one service and is passed down; nothing is global. Label sets are bounded: past
`MAX_SERIES` of one metric, further sets are folded into one series labelled `other`, so that no client can grow memory.
Not thread-safe: touched from the event loop's thread only.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

MAX_SERIES = 256
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class CounterSeries:
    """One label set of a counter: counted here, or a total that is kept elsewhere and asked for at exposition."""

    __slots__ = ("_source", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self._source: Callable[[], float] | None = None

    def add(self, amount: float = 1.0) -> None:
        self.value += amount

    def follow(self, source: Callable[[], float]) -> None:
        self._source = source

    def lines(self, name: str, labels: str) -> list[str]:
        value = self.value if self._source is None else self._source()
        return [f"{name}{_braced(labels)} {_number(value)}"]


class GaugeSeries:
    """One label set of a gauge: a value that was set, or a function that is asked at exposition."""

    __slots__ = ("_source", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self._source: Callable[[], float] | None = None

    def set(self, value: float) -> None:
        self.value = value

    def add(self, amount: float) -> None:
        self.value += amount

    def follow(self, source: Callable[[], float]) -> None:
        self._source = source

    def lines(self, name: str, labels: str) -> list[str]:
        value = self.value if self._source is None else self._source()
        return [f"{name}{_braced(labels)} {_number(value)}"]


class HistogramSeries:
    """One label set of a histogram. `observe` is a bisection and three additions."""

    __slots__ = ("_bounds", "_counts", "count", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.count = 0
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.count += 1
        self.sum += value

    def lines(self, name: str, labels: str) -> list[str]:
        lines, below = [], 0
        comma = "," if labels else ""
        for bound, count in zip((*self._bounds, math.inf), self._counts, strict=True):
            below += count
            lines.append(f'{name}_bucket{{{labels}{comma}le="{_number(bound)}"}} {below}')
        lines.append(f"{name}_sum{_braced(labels)} {_number(self.sum)}")
        lines.append(f"{name}_count{_braced(labels)} {self.count}")
        return lines


class Exposed(Protocol):
    def lines(self, name: str, labels: str) -> list[str]: ...


Series = TypeVar("Series", bound=Exposed)


class Family(Generic[Series]):
    """A metric with its label names; `series(*values)` is the one with these label values, made on first use."""

    def __init__(self, name: str, help_text: str, kind: str, labels: tuple[str, ...], make: Callable[[], Series]) -> None:
        self.name = name
        self._help = help_text
        self._kind = kind
        self._labels = labels
        self._make = make
        self._series: dict[tuple[str, ...], Series] = {}
        if not labels:
            self._series[()] = make()

    def series(self, *values: str) -> Series:
        found = self._series.get(values)
        if found is not None:
            return found
        if len(values) != len(self._labels):
            raise ValueError(f"{self.name} has the labels {self._labels}, got {values}")
        if len(self._series) >= MAX_SERIES:
            values = ("other",) * len(self._labels)
            if values in self._series:
                return self._series[values]
        made = self._series[values] = self._make()
        return made

    def lines(self) -> list[str]:
        lines = [f"# HELP {self.name} {_escaped_help(self._help)}", f"# TYPE {self.name} {self._kind}"]
        for values, series in self._series.items():
            labels = ",".join(f'{label}="{_escaped(value)}"' for label, value in zip(self._labels, values, strict=True))
            lines += series.lines(self.name, labels)
        return lines


class Metrics:
    """All metrics of one service. A name can be taken once."""

    def __init__(self) -> None:
        self._families: dict[str, Family[CounterSeries] | Family[GaugeSeries] | Family[HistogramSeries]] = {}

    def counter(self, name: str, help_text: str, labels: Sequence[str] = ()) -> Family[CounterSeries]:
        family = Family(name, help_text, "counter", tuple(labels), CounterSeries)
        self._take(name)
        self._families[name] = family
        return family

    def gauge(self, name: str, help_text: str, labels: Sequence[str] = ()) -> Family[GaugeSeries]:
        family = Family(name, help_text, "gauge", tuple(labels), GaugeSeries)
        self._take(name)
        self._families[name] = family
        return family

    def histogram(
        self, name: str, help_text: str, labels: Sequence[str] = (), *, buckets: Sequence[float] = LATENCY_BUCKETS_S
    ) -> Family[HistogramSeries]:
        bounds = tuple(sorted(buckets))
        family = Family(name, help_text, "histogram", tuple(labels), lambda: HistogramSeries(bounds))
        self._take(name)
        self._families[name] = family
        return family

    def exposition(self) -> str:
        """The Prometheus text format, version 0.0.4."""
        return "\n".join(line for family in self._families.values() for line in family.lines()) + "\n"

    def _take(self, name: str) -> None:
        if name in self._families:
            raise ValueError(f"metric {name} is there already")


def _number(value: float) -> str:
    if value == math.inf:
        return "+Inf"
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


def _braced(labels: str) -> str:
    return f"{{{labels}}}" if labels else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _escaped_help(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")
