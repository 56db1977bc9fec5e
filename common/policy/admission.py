"""Whether a request is taken: predicted TTFT and TPOT against its objectives, at the time it would get there.

A request that cannot be good makes others bad and is no use to its client, so it is told at once when to come back; or, where
its class says so, it is served behind those that can be good.
"""

import math
from dataclasses import dataclass
from typing import Literal

from common.policy.step_time import DecodeTime
from common.values.objectives import Objectives, Speed

LatePolicy = Literal["refuse", "best_effort"]
SHORTEST_RETRY_S = 1.0
LONGEST_RETRY_S = 60.0
BUSIEST = 0.95
"""Utilisation is taken as at most this: a worker that gets more than it can do has no end to its queue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeOutlook:
    """A decode worker now, and what comes and goes: `left_s` is the mean time that its streams still run, `joins_per_s` what
    is sent there."""

    sequences: float
    kv_tokens: float
    left_s: float
    joins_per_s: float = 0.0

    def after(self, seconds: float) -> "DecodeOutlook":
        """The fluid limit: streams leave at a rate of one a `left_s` each, others join."""
        if self.left_s <= 0.0 or seconds <= 0.0:
            return self
        settled = self.joins_per_s * self.left_s
        sequences = settled + (self.sequences - settled) * math.exp(-seconds / self.left_s)
        context = self.kv_tokens / self.sequences if self.sequences else 0.0
        return DecodeOutlook(sequences=sequences, kv_tokens=context * sequences, left_s=self.left_s, joins_per_s=self.joins_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillOutlook:
    """The prefill worker that would take it: seconds of work in front of it, and the share of its time that is asked for."""

    queue_s: float
    work_s: float
    transfer_s: float = 0.0
    utilisation: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    predicted: Speed


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedLate:
    """Taken without a promise, behind those that can be good."""

    predicted: Speed


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """429: `retry_after_s` is when it could be good, by what is known now."""

    predicted: Speed
    retry_after_s: float


Admission = Admitted | ServedLate | Refused


def decide_admission(
    time: DecodeTime,
    prefill: PrefillOutlook,
    decode: DecodeOutlook,
    objectives: Objectives,
    *,
    context_tokens: int,
    late: LatePolicy,
) -> Admission:
    predicted = predict_speed(time, prefill, decode, context_tokens=context_tokens)
    if predicted.meets(objectives, prefill.work_s):
        return Admitted(predicted=predicted)
    if late == "best_effort":
        return ServedLate(predicted=predicted)
    prompts_s = _prefill_wait_s(prefill, objectives)
    streams_s = _decode_wait_s(time, prefill, decode, objectives, context_tokens)
    wait_s = math.ceil(max(prompts_s, streams_s))
    return Refused(predicted=predicted, retry_after_s=min(LONGEST_RETRY_S, max(SHORTEST_RETRY_S, wait_s)))


def predict_speed(time: DecodeTime, prefill: PrefillOutlook, decode: DecodeOutlook, *, context_tokens: int) -> Speed:
    """The first token leaves before the transfer; the decode worker is met as it will be after it."""
    ttft_s = prefill.queue_s + prefill.work_s
    met = decode.after(ttft_s + prefill.transfer_s)
    return Speed(ttft_s=ttft_s, tpot_s=time.seconds(math.ceil(met.sequences) + 1, met.kv_tokens + context_tokens))


def _prefill_wait_s(prefill: PrefillOutlook, objectives: Objectives) -> float:
    """Until the queue has shrunk to what the objective allows: it shrinks by what is not asked for by others."""
    excess_s = prefill.queue_s + prefill.work_s - objectives.ttft_for(prefill.work_s)
    return max(0.0, excess_s) / (1.0 - min(BUSIEST, prefill.utilisation))


def _decode_wait_s(
    time: DecodeTime, prefill: PrefillOutlook, decode: DecodeOutlook, objectives: Objectives, context_tokens: int
) -> float:
    """Until enough streams have left: doubling, then halving, the time after which the prediction is good."""

    def is_good(wait_s: float) -> bool:
        later = decode.after(wait_s)
        return predict_speed(time, prefill, later, context_tokens=context_tokens).tpot_s <= objectives.tpot_s

    if is_good(0.0):
        return 0.0
    high = SHORTEST_RETRY_S
    while not is_good(high):
        high *= 2.0
        if high > LONGEST_RETRY_S:
            return LONGEST_RETRY_S
    low = 0.0
    while high - low > 0.5:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if is_good(middle) else (middle, high)
    return high
