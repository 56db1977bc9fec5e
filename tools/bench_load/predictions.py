"""What `segue simulate --json` said, to be drawn beside what was measured."""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from tools.bench_load.bench_refused import BenchRefused


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The part of all requests that a deployment was predicted to serve well, by rate."""

    deployment: str
    shares: Mapping[float, float]


class _Total(msgspec.Struct):
    attained: float


class _Row(msgspec.Struct):
    """Of one rate (`offered_rps`, `total`), or of all rates that `--find-goodput` tried."""

    deployment: str
    offered_rps: float | None = None
    total: _Total | None = None
    tried: list[tuple[float, float]] = []


def parse_predictions(text: bytes) -> tuple[Prediction, ...]:
    try:
        rows = msgspec.json.decode(text, type=list[_Row])
    except msgspec.DecodeError as error:
        raise BenchRefused(f"--predicted takes what `segue simulate --json` wrote: {error}") from None
    shares: dict[str, dict[float, float]] = {}
    for row in rows:
        known = shares.setdefault(row.deployment, {})
        known.update(row.tried)
        if row.offered_rps is not None and row.total is not None:
            known[row.offered_rps] = row.total.attained
    return tuple(Prediction(deployment=name, shares=dict(sorted(known.items()))) for name, known in shares.items() if known)
