"""The file of results: one line of JSON a point, written when it is done, so that a run that was broken off goes on after it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tools.bench_load.bench_refused import BenchRefused
from tools.bench_load.request_result import RequestResult


@dataclass(frozen=True, slots=True, kw_only=True)
class PointKey:
    """What makes two points the same measurement. `commit` names the build that serves, `workload` its classes or trace,
    `arrivals` the process; `rate` is None in a closed loop and for a trace in its own time."""

    cpu: str
    commit: str
    label: str
    model: str
    api: str
    workload: str
    arrivals: str
    rate: float | None
    seed: int
    requests: int
    warmup: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """`started_at` is wall-clock seconds; `real_rate` the measured requests a second that were drawn."""

    key: PointKey
    started_at: float
    real_rate: float | None
    results: tuple[RequestResult, ...]

    @property
    def measured(self) -> list[RequestResult]:
        return [one for one in self.results if one.measured]


class ResultsFile:
    """Points by key; without a path they live as long as the process."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._points = {point.key: point for point in self._read()}

    def get(self, key: PointKey) -> Point | None:
        return self._points.get(key)

    def add(self, point: Point) -> None:
        self._points[point.key] = point
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(msgspec.json.encode(point) + b"\n")

    def _read(self) -> Iterator[Point]:
        if self._path is None or not self._path.exists():
            return
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # broken off while it was written
            self._path.write_bytes(whole)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                yield msgspec.json.decode(line, type=Point)
            except msgspec.DecodeError as error:
                raise BenchRefused(f"{self._path}, line {number} is no point of this command: {error}") from None
