"""Requests that others have recorded: the lines of a Mooncake trace (JSON lines) or of an Azure LLM trace (CSV).

Azure's are published under CC-BY (Azure/AzurePublicDataset), Mooncake's by kvcache-ai/Mooncake: whoever shows results gives them
credit.
"""

import csv
import json
from collections.abc import Iterable
from datetime import datetime
from random import Random

from common.simulation.goodput.flight import Arrival

MOONCAKE_BLOCK_TOKENS = 512
"""A prefix name stands for that many tokens, and all before them."""
MOONCAKE_BIN_S = 3.0
"""Conversation stamps are rounded to bins of that width: up to 28 requests share one."""
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def mooncake_arrivals(lines: Iterable[str], rng: Random, *, bin_s: float = MOONCAKE_BIN_S) -> list[Arrival]:
    """Requests of one stamp are spread over its bin: all at once would be a burst that never was. `bin_s` zero leaves them."""
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
        at = stamp / 1000.0 + (bin_s * rng.random() if bin_s else 0.0)
        arrivals.append(_arrival(number, at, prompt, output, prefix))
    return _from_zero(arrivals)


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


def _from_zero(arrivals: list[Arrival]) -> list[Arrival]:
    arrivals.sort(key=lambda arrival: arrival.arrived_s)
    start = arrivals[0].arrived_s if arrivals else 0.0
    return [
        Arrival(
            arrived_s=each.arrived_s - start,
            prompt_tokens=each.prompt_tokens,
            output_tokens=each.output_tokens,
            prefix=each.prefix,
        )
        for each in arrivals
    ]
