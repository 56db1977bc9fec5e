"""From what a client saw of a server to steps: TTFTs of prompts alone, and the pace of streams while their number stays the same.

The streams of a server that batches continuously all wait for the same steps. So between two moments at which a stream begins or
ends, and while no prompt is waiting, the gap between a stream's tokens is the time of a step of that many rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from common.policy.step_time_fit import DecodeSample
from tools.bench_load.request_result import RequestResult

LEAST_GAPS = 5
"""Between tokens of each stream, for its pace to count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSample:
    """A prompt alone: `past` of it were cached."""

    tokens: int
    past: int
    ttft_s: float


def prompt_samples(results: Sequence[RequestResult]) -> list[PromptSample]:
    found = []
    for result in results:
        if result.is_complete and result.ttft_s is not None:
            past = min(result.cached_tokens or 0, result.prompt_tokens - 1)
            found.append(PromptSample(tokens=result.prompt_tokens - past, past=past, ttft_s=result.ttft_s))
    return found


def pace_samples(burst: Sequence[RequestResult]) -> list[DecodeSample]:
    """None of a burst in which a request failed: nobody knows how long its row was there."""
    if not all(result.is_complete for result in burst):
        return []
    begun = max(result.arrivals_s[0] for result in burst)
    ends = sorted({result.arrivals_s[-1] for result in burst if result.arrivals_s[-1] > begun})
    found = []
    for start, end in pairwise([begun, *ends]):
        running = [result for result in burst if result.arrivals_s[-1] >= end]
        paces = [pace for result in running if (pace := _pace(result, start, end)) is not None]
        if len(paces) == len(running) and (seconds := median(paces)) > 0.0:
            middle = 0.5 * (start + end)
            cached = sum(result.prompt_tokens + _tokens_at(result, middle) for result in running)
            found.append(DecodeSample(sequences=len(running), kv_tokens=round(cached), seconds=seconds))
    return found


def _pace(result: RequestResult, start: float, end: float) -> float | None:
    """Seconds a token. An event may carry several tokens, or a token no text."""
    inside = [at for at in result.arrivals_s if start <= at <= end]
    if len(inside) <= LEAST_GAPS:
        return None
    return (inside[-1] - inside[0]) / (len(inside) - 1) / _tokens_an_event(result)


def _tokens_at(result: RequestResult, moment: float) -> float:
    return sum(at <= moment for at in result.arrivals_s) * _tokens_an_event(result)


def _tokens_an_event(result: RequestResult) -> float:
    return max(1, result.output_tokens - 1) / max(1, len(result.arrivals_s) - 1)
