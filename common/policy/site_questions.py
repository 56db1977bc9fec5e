"""What placement asks of one worker about one request, in seconds. The gateway asks it of snapshots, the simulator of its
workers: the answers are the same functions.
"""

from dataclasses import dataclass

from common.policy.admission import DecodeOutlook, PrefillOutlook
from common.policy.free_placement import StayQuestion, StreamLoad, chooses_beside, prefill_beside, stays
from common.policy.placement import decode_cost_s, prefill_cost_s
from common.policy.step_time import StepTime

BUSY = 0.8
"""From this share of their time on that prompts want, prefill workers keep no streams."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedRequest:
    """A request as placement sees it. `output_tokens` are predicted, `ttft_s` and `tpot_s` its objectives."""

    prompt_tokens: int
    output_tokens: float
    ttft_s: float
    tpot_s: float


def prompt_seconds(
    time: StepTime, load: StreamLoad, *, tokens: int, cached: int, step_tokens: int, mixes: bool, transfer_s: float = 0.0
) -> float:
    """Until the prompt is computed there, and handed over where it is. `mixes`: in chunks, beside what is decoded there."""
    if mixes:
        known = min(cached, tokens - 1)
        return prefill_beside(time, load, tokens=tokens - known, past=known, step_tokens=step_tokens).ttft_s + transfer_s
    return prefill_cost_s(time.prefill, queue_s=load.queue_s, prompt_tokens=tokens, cached_tokens=cached, transfer_s=transfer_s)


def goes_beside(
    time: StepTime,
    load: StreamLoad,
    request: PlacedRequest,
    *,
    cached: int,
    step_tokens: int,
    elsewhere_s: float,
    room_tokens: float,
) -> bool:
    """Whether a prompt is computed on the worker that will decode it. `load` is with its streams' slack; `elsewhere_s`: when it
    would be computed on the best worker for prompts."""
    known = min(cached, request.prompt_tokens - 1)
    beside = prefill_beside(time, load, tokens=request.prompt_tokens - known, past=known, step_tokens=step_tokens)
    fits = request.prompt_tokens + request.output_tokens <= room_tokens
    return chooses_beside(beside, load, elsewhere_s, request.ttft_s, fits=fits)


def stream_seconds(time: StepTime, load: StreamLoad, request: PlacedRequest, *, room_tokens: float) -> float:
    """A token of it, decoded there."""
    return decode_cost_s(
        time.decode,
        sequences=load.sequences,
        kv_tokens=load.kv_tokens,
        context_tokens=request.prompt_tokens,
        output_tokens=request.output_tokens,
        room_tokens=room_tokens,
    )


def stays_here(
    time: StepTime,
    here: StreamLoad,
    request: PlacedRequest,
    *,
    there_s: float,
    transfer_s: float,
    room_tokens: float,
    prompts_wait: bool,
    prompts_asked: float,
) -> bool:
    """Whether it decodes where it is prefilled. `there_s`: a token of it on the best decode worker; `prompts_wait`: others are
    behind it here; `prompts_asked`: the share of the prefill workers' time that prompts have wanted lately."""
    question = StayQuestion(
        tpot_s=request.tpot_s,
        there_tpot_s=there_s + transfer_s / max(1.0, request.output_tokens),
        context_tokens=request.prompt_tokens,
        output_tokens=request.output_tokens,
        room_tokens=room_tokens,
        prompt_slack_s=0.0 if prompts_wait or prompts_asked > BUSY else request.ttft_s,
    )
    return stays(time, here, question)


def decode_outlook(load: StreamLoad, *, left_s: float, arrivals_per_s: float, workers: int) -> DecodeOutlook:
    """`arrivals_per_s` are shared by that many workers."""
    joins = arrivals_per_s / max(1, workers)
    return DecodeOutlook(sequences=load.sequences, kv_tokens=load.kv_tokens, left_s=left_s, joins_per_s=joins)


def prefill_outlook(cost_s: float, unloaded_s: float, *, utilisation: float) -> PrefillOutlook:
    work_s = min(cost_s, unloaded_s)
    return PrefillOutlook(queue_s=cost_s - work_s, work_s=work_s, utilisation=utilisation)
