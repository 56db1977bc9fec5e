"""Traces of real services as arrivals and lengths: Mooncake's JSON lines, Azure's CSV.

A trace of a large cluster fits a small machine only if it is made smaller; each way says what it does: `at_rate` stretches time,
`shrunk` divides lengths, `fitting` leaves out what does not fit and says how many that were.
"""

import csv
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from tools.bench_load.bench_refused import BenchRefused


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRow:
    """Seconds from the first row."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


def parse_trace(text: str, rng: random.Random) -> list[TraceRow]:
    """Either format, told by its first character. Rows with one time stamp lie anywhere up to the next stamp: Mooncake's stamps
    are those of 3 s bins, and sent at once they would be bursts that never were."""
    try:
        rows = _mooncake(text) if text.lstrip().startswith("{") else _azure(text)
    except (KeyError, ValueError, TypeError) as error:
        raise BenchRefused(f"the trace is neither Mooncake's JSON lines nor Azure's CSV: {error!r}") from None
    if not rows:
        raise BenchRefused("the trace is empty")
    return _spread(rows, rng)


def at_rate(rows: Sequence[TraceRow], rate: float) -> list[TraceRow]:
    """The same order and lengths with time stretched, so that `rate` requests come a second on the mean."""
    span = rows[-1].at_s - rows[0].at_s
    if len(rows) < 2 or span <= 0.0:
        raise BenchRefused("a trace of one moment has no rate")
    factor = (len(rows) - 1) / span / rate
    return [
        TraceRow(at_s=(row.at_s - rows[0].at_s) * factor, prompt_tokens=row.prompt_tokens, output_tokens=row.output_tokens)
        for row in rows
    ]


def shrunk(rows: Iterable[TraceRow], divisor: float) -> list[TraceRow]:
    """Lengths divided, at least one token."""
    return [
        TraceRow(
            at_s=row.at_s,
            prompt_tokens=max(1, round(row.prompt_tokens / divisor)),
            output_tokens=max(1, round(row.output_tokens / divisor)),
        )
        for row in rows
    ]


def fitting(rows: Sequence[TraceRow], max_tokens: int) -> tuple[list[TraceRow], int]:
    """What fits into a context, and how many rows did not."""
    kept = [row for row in rows if row.prompt_tokens + row.output_tokens <= max_tokens]
    return kept, len(rows) - len(kept)


def _mooncake(text: str) -> list[TraceRow]:
    parsed = [json.loads(line) for line in text.splitlines() if line.strip()]
    first = float(parsed[0]["timestamp"])
    return [
        TraceRow(
            at_s=(float(row["timestamp"]) - first) / 1000.0,
            prompt_tokens=max(1, int(row["input_length"])),
            output_tokens=max(1, int(row["output_length"])),
        )
        for row in parsed
    ]


def _azure(text: str) -> list[TraceRow]:
    parsed = list(csv.DictReader(text.splitlines()))
    times = [datetime.fromisoformat(row["TIMESTAMP"]) for row in parsed]
    return [
        TraceRow(
            at_s=(time - times[0]).total_seconds(),
            prompt_tokens=max(1, int(row["ContextTokens"])),
            output_tokens=max(1, int(row["GeneratedTokens"])),
        )
        for row, time in zip(parsed, times, strict=True)
    ]


def _spread(rows: Sequence[TraceRow], rng: random.Random) -> list[TraceRow]:
    rows_at = Counter(row.at_s for row in rows)
    stamps = sorted(rows_at)
    following = dict(pairwise(stamps))
    placed = [
        TraceRow(
            at_s=rng.uniform(row.at_s, following[row.at_s]) if rows_at[row.at_s] > 1 and row.at_s in following else row.at_s,
            prompt_tokens=row.prompt_tokens,
            output_tokens=row.output_tokens,
        )
        for row in rows
    ]
    return sorted(placed, key=lambda row: row.at_s)
