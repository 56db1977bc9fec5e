"""How many requests a second a number of workers would serve well, without simulating: where a search for the best split begins.

Prompts wait as in an M/G/k queue whose fixed cost is shared by a batch; streams are as many as arrive while one lasts (Little), and
have to be paced and to fit into KV. Rough by a third and more, but the best split is rarely more than one worker away.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from common.policy.step_time import StepTime
from common.values.objectives import Objectives

WANTED = 0.9
SPREAD = 0.6
"""Standard deviations of the number of streams (Poisson, evened out by placement) that a worker has to bear."""
HALVINGS = 40
SETTLED = 12
"""Rounds after which the number of streams and the step time that it causes agree."""

Limit = Literal["prefill", "step time", "KV", "sequences"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedRequest:
    """One of a sample that stands for all that come."""

    prompt_tokens: int
    output_tokens: int
    objectives: Objectives


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """`batch_tokens` of a prefill step, `step_tokens` of a step that mixes."""

    kv_tokens: int
    max_sequences: int
    batch_tokens: int
    step_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Requests a second, and what sets the bound."""

    rate: float
    limit: Limit


class ClosedForm:
    """Of one kind of worker and one demand. Rates are of all the workers that are asked for together."""

    def __init__(self, time: StepTime, limits: WorkerLimits, sample: Sequence[ExpectedRequest]) -> None:
        if not sample:
            raise ValueError("a demand has at least one request")
        self._time = time
        self._limits = limits
        self._sample = sample
        self._work_s = [time.prefill.chunk_s(each.prompt_tokens) for each in sample]
        self._slack_s = [
            each.objectives.ttft_for(time.prefill.seconds(each.prompt_tokens)) - time.prefill.base_s - work_s
            for each, work_s in zip(sample, self._work_s, strict=True)
        ]
        paces = sorted(each.objectives.tpot_s for each in sample)
        self._tpot_s = paces[int((1.0 - WANTED) * len(paces))]
        steps = [max(0, each.output_tokens - 1) for each in sample]
        self._steps = max(1e-9, _mean(steps))
        reads = [count * (each.prompt_tokens + 0.5 * count) for each, count in zip(sample, steps, strict=True)]
        holds = [count * (each.prompt_tokens + each.output_tokens) for each, count in zip(sample, steps, strict=True)]
        self._read_tokens = _mean(reads) / self._steps
        self._held_tokens = _mean(holds) / self._steps

    def split(self, prefill: int, decode: int) -> Capacity:
        """The lesser of both sides."""
        prompts, streams = self.prefill(prefill), self.decode(decode)
        return prompts if prompts.rate <= streams.rate else streams

    def prefill(self, workers: int) -> Capacity:
        """The rate at which the wanted share of prompts is computed on time."""
        prompts_a_batch = max(1.0, self._limits.batch_tokens / _mean([each.prompt_tokens for each in self._sample]))
        shared_s = _mean(self._work_s) + self._time.prefill.base_s / prompts_a_batch
        alone = [self._time.prefill.base_s + work_s for work_s in self._work_s]
        return Capacity(rate=self._prompt_rate(workers, shared_s, alone, self._slack_s), limit="prefill")

    def decode(self, workers: int) -> Capacity:
        streams, limit = self._streams_borne(1.0)
        return Capacity(rate=workers * streams / (self._steps * self._beside_s(streams)), limit=limit)

    def colocated(self, workers: int) -> Capacity:
        """Steps are as much longer as prompts take of the time; a prompt takes as many steps as it has chunks."""

        def bears(rate: float) -> Limit | None:
            busy = rate * _mean(self._work_s)
            if busy >= 1.0:
                return "prefill"
            most, limit = self._streams_borne(1.0 - busy)
            streams = 0.0
            for _ in range(SETTLED):
                streams = min(most, rate * self._steps * self._beside_s(streams) / (1.0 - busy))
            if streams >= most:
                return limit
            chunk = max(1, self._limits.step_tokens - math.ceil(streams))
            overheads = [math.ceil(each.prompt_tokens / chunk) * self._beside_s(streams) for each in self._sample]
            alone = [overhead_s + work_s for overhead_s, work_s in zip(overheads, self._work_s, strict=True)]
            slack = [own_s - overhead_s for own_s, overhead_s in zip(self._slack_s, overheads, strict=True)]
            return None if workers * rate <= self._prompt_rate(workers, _mean(alone), alone, slack) else "prefill"

        low, high, limit = 0.0, self.decode(1).rate, None
        for _ in range(HALVINGS // 2):
            middle = 0.5 * (low + high)
            found = bears(middle)
            low, high, limit = (middle, high, limit) if found is None else (low, middle, found)
        return Capacity(rate=workers * low, limit=limit or "step time")

    def _beside_s(self, streams: float) -> float:
        """A step of that many streams, without prompts."""
        return self._time.decode.seconds(math.ceil(streams), streams * self._read_tokens)

    def _streams_borne(self, share: float) -> tuple[float, Limit]:
        """The most streams of one worker on the mean, when that share of its time is for them; and what bounds them."""
        reason: Limit = "sequences"

        def bound(streams: float) -> Limit | None:
            most = streams + SPREAD * math.sqrt(streams)
            if self._beside_s(most) > share * self._tpot_s:
                return "step time"
            return "KV" if most * self._held_tokens > self._limits.kv_tokens else None

        low, high = 0.0, float(self._limits.max_sequences)
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            found = bound(middle)
            if found is None:
                low = middle
            else:
                high, reason = middle, found
        return max(low, 1e-9), reason

    def _prompt_rate(self, workers: int, work_s: float, alone_s: Sequence[float], slack_s: Sequence[float]) -> float:
        """M/G/k with an exponential tail: who waits at all, waits as long as what is left of a step, over the idle share."""
        rest_s = _mean([each * each for each in alone_s]) / (2.0 * _mean(alone_s))

        def on_time(rate: float) -> float:
            busy = min(1.0 - 1e-9, rate * work_s / workers)
            waits = _erlang_c(workers, busy)
            pace = math.sqrt(workers) * (1.0 - busy) / rest_s
            return _mean([1.0 - waits * math.exp(-pace * slack) if slack >= 0.0 else 0.0 for slack in slack_s])

        low, high = 0.0, workers / work_s
        for _ in range(HALVINGS // 2):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if on_time(middle) >= WANTED else (low, middle)
        return low


def _erlang_c(servers: int, busy: float) -> float:
    """The share of those who come that find every server taken."""
    offered = servers * busy
    blocked = 1.0
    for count in range(1, servers + 1):
        blocked = offered * blocked / (count + offered * blocked)
    return blocked / (1.0 - busy * (1.0 - blocked))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
