"""Requests that others have recorded: the lines of a Mooncake trace (JSON lines) or of an Azure LLM trace (CSV).

Azure's are published under CC-BY (Azure/AzurePublicDataset), Mooncake's by kvcache-ai/Mooncake: whoever shows results gives them
credit.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from random import Random

from common.simulation.goodput.flight import Arrival

MOONCAKE_BLOCK_TOKENS = 512
"""A prefix name stands for that many tokens, and all before them."""
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def trace_arrivals(text: str, rng: Random) -> list[Arrival]:
    """Either format, told by its first character."""
    lines = text.lstrip("\ufeff \t\r\n").splitlines()
    arrivals = mooncake_arrivals(lines, rng) if lines and lines[0].startswith("{") else azure_arrivals(lines)
    if not arrivals:
        raise ValueError("the trace is empty")
    return arrivals


def mooncake_arrivals(lines: Iterable[str], rng: Random) -> list[Arrival]:
    """Requests of one stamp are spread over the trace's bin (the conversations' stamps are rounded to 3 s, and up to 28 requests
    share one): all at once would be a burst that never was."""
    arrivals = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            stamp, prompt, output = float(row["timestamp"]), int(row["input_length"]), int(row["output_length"])
            prefix = tuple(int(name) for name in row.get("hash_ids", ()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"line {number} is not of a Mooncake trace: {error}") from None
        arrivals.append(_arrival(number, stamp / 1000.0, prompt, output, prefix))
    return _from_zero(_spread(arrivals, rng))


def azure_arrivals(lines: Iterable[str]) -> list[Arrival]:
    """`TIMESTAMP,ContextTokens,GeneratedTokens`, stamps of 100 ns."""
    rows = csv.reader(lines)
    header = next(rows, [])
    if tuple(name.strip("\ufeff ") for name in header) != AZURE_COLUMNS:
        raise ValueError(f"not an Azure trace: its first line is not {','.join(AZURE_COLUMNS)}")
    arrivals = []
    for number, row in enumerate(rows, 2):
        if not row:
            continue
        try:
            stamp, prompt, output = row
            at = _azure_seconds(stamp)
            arrivals.append(_arrival(number, at, int(prompt), int(output), ()))
        except ValueError as error:
            raise ValueError(f"line {number} is not of an Azure trace: {error}") from None
    return _from_zero(arrivals)


def _azure_seconds(stamp: str) -> float:
    whole, _, fraction = stamp.strip().partition(".")
    elapsed = datetime.fromisoformat(whole) - datetime(2023, 1, 1)
    return elapsed.total_seconds() + (float(f"0.{fraction}") if fraction else 0.0)


def _arrival(number: int, at: float, prompt: int, output: int, prefix: tuple[int, ...]) -> Arrival:
    """Some rows tell of requests without any output: they are prefilled all the same, for one token."""
    if prompt < 0 or output < 0:
        raise ValueError(f"line {number} has a negative length")
    return Arrival(arrived_s=at, prompt_tokens=max(1, prompt), output_tokens=max(1, output), prefix=prefix)


def _spread(arrivals: Sequence[Arrival], rng: Random) -> list[Arrival]:
    """The bin is the least time between two stamps; a stamp of one request is taken as exact."""
    sharing = Counter(arrival.arrived_s for arrival in arrivals)
    bin_s = min((later - earlier for earlier, later in pairwise(sorted(sharing))), default=0.0)
    return [
        replace(each, arrived_s=each.arrived_s + bin_s * rng.random()) if sharing[each.arrived_s] > 1 else each for each in arrivals
    ]


def _from_zero(arrivals: list[Arrival]) -> list[Arrival]:
    arrivals.sort(key=lambda arrival: arrival.arrived_s)
    start = arrivals[0].arrived_s if arrivals else 0.0
    return [replace(each, arrived_s=each.arrived_s - start) for each in arrivals]
