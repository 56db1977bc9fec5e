"""The closed form: how much of what a phase's workers can do is asked of them, under the wanted objectives.

Prefill workers do a second of prompts a second; a decode worker makes the tokens of as many streams as its step time
stays within the TPOT objective and as its KV holds. It knows no queues and no bursts: it tells which phase is pressed, and a
trial in the simulator tells whether moving a worker helps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from common.policy.role_view import MeshView, SeenRequest
from common.policy.step_time import DecodeTime

LARGEST_BATCH = 1 << 14
UNSERVED = 1e6
"""The pressure of a phase without workers; finite, for logs are JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMean:
    """Of one request, on average: seconds of prefill alone, tokens it makes, its TPOT objective; and `context_tokens` cached for
    each stream of a step, where long answers are met more often."""

    prefill_s: float
    context_tokens: float
    output_tokens: float
    tpot_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """Work that is asked for by what can be done: above 1 a queue grows for ever. A phase without workers is pressed beyond all bounds
    where something is asked of it."""

    prefill: float
    decode: float

    @property
    def worst(self) -> float:
        return max(self.prefill, self.decode)


def mean_of(requests: Sequence[SeenRequest], weights: Sequence[float], view: MeshView) -> RequestMean | None:
    """None where nothing was seen."""
    whole = sum(weights)
    if not requests or whole <= 0.0:
        return None
    prefill_s = context = output = tpot_s = 0.0
    for request, weight in zip(requests, weights, strict=True):
        prefill_s += weight * view.step_time.prefill.seconds(request.prompt_tokens)
        context += weight * request.output_tokens * (request.prompt_tokens + 0.5 * request.output_tokens)
        output += weight * request.output_tokens
        tpot_s += weight * request.tpot_s
    return RequestMean(
        prefill_s=prefill_s / whole, context_tokens=context / output, output_tokens=output / whole, tpot_s=tpot_s / whole
    )


def pressure(view: MeshView, mean: RequestMean, rate: float, *, within_s: float, moved: int = 0) -> Pressure:
    """With `moved` decode workers turned to prefill (negative: the other way). Work that waits is to be done `within_s`."""
    prefill = len(view.prefill) + moved
    decode = len(view.decode) - moved
    mixed = len(view.both)
    waiting_s = sum(worker.prefill_queue_s for worker in view.workers)
    left_tokens = sum(worker.decoding * worker.tokens_left for worker in view.workers)
    prompts_s = rate * mean.prefill_s + waiting_s / within_s
    tokens = max(rate * mean.output_tokens, left_tokens / within_s)
    kv_tokens = min((worker.kv_tokens for worker in view.workers), default=0)
    most = min((worker.max_sequences for worker in view.workers), default=0)
    able = decode_tokens_per_s(view.step_time.decode, mean, kv_tokens=kv_tokens, max_sequences=most)
    # a colocated worker has its time for one phase or the other: half for each, on average
    return Pressure(prefill=_share(prompts_s, prefill + 0.5 * mixed), decode=_share(tokens, able * (decode + 0.5 * mixed)))


def decode_tokens_per_s(time: DecodeTime, mean: RequestMean, *, kv_tokens: int, max_sequences: int) -> float:
    """Of one worker, with as many streams as objective and KV allow (at least one). Bisection: the step grows with the streams."""
    low, high = 1, max(1, min(max_sequences, int(kv_tokens / max(1.0, mean.context_tokens)), LARGEST_BATCH))
    while low < high:
        middle = (low + high + 1) // 2
        if time.seconds(middle, middle * mean.context_tokens) <= mean.tpot_s:
            low = middle
        else:
            high = middle - 1
    step_s = time.seconds(low, low * mean.context_tokens)
    return low / step_s if step_s > 0.0 else float("inf")


def _share(asked: float, able: float) -> float:
    if able > 0.0:
        return asked / able
    return UNSERVED if asked > 0.0 else 0.0
