"""When a request is better off on one worker than split over two.

Splitting keeps prompts out of the way of running streams; that is worth its transfer and its second queue only where streams
would miss their objective, or where the prefill worker is free. So a prompt may be computed on its decode worker, in chunks beside the
decode rows, and a request may stay and decode where it was prefilled.
"""

from dataclasses import dataclass

from common.policy.step_time import StepTime


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLoad:
    """What a worker decodes. `slack_s`: the seconds that its streams can lose until one misses its TPOT objective (the least
    over streams; infinite where none runs). `queue_s`: prompts that wait there already."""

    sequences: int
    kv_tokens: float
    slack_s: float
    queue_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """A prompt computed beside running streams: its TTFT there, and the seconds that every stream loses."""

    ttft_s: float
    damage_s: float


def stream_slack_s(*, tpot_s: float, decoded: int, spent_s: float, left: float, step_s: float) -> float:
    """What one stream can lose: its objective for all the tokens it will have made, less what it took and will take."""
    return tpot_s * (decoded + left) - spent_s - left * step_s


def prefill_beside(time: StepTime, load: StreamLoad, *, tokens: int, past: int, step_tokens: int) -> Beside:
    """`step_tokens`: the most positions of one step, decode rows included."""
    chunk = max(1, step_tokens - load.sequences)
    steps = -(-tokens // chunk)
    decode_s = time.decode.seconds(load.sequences, load.kv_tokens) if load.sequences else 0.0
    whole_s = time.prefill.chunk_s(tokens, past) + steps * time.beside_s(load.sequences, load.kv_tokens)
    return Beside(ttft_s=load.queue_s + whole_s, damage_s=whole_s - steps * decode_s)


def chooses_beside(beside: Beside, load: StreamLoad, elsewhere_s: float, objective_s: float, *, fits: bool) -> bool:
    """Whether the prompt is computed on its decode worker: sooner than elsewhere, and nobody there misses an objective because
    of it. Streams are not slowed down for nothing: a prompt that is on time elsewhere, or late here too, goes only to an idle
    worker. `fits`: there is room for its KV now; a prompt holds it from its first chunk on, longer than a hand-off would."""
    if not fits:
        return False
    if load.sequences and not beside.ttft_s <= objective_s < elsewhere_s:
        return False
    return beside.ttft_s < elsewhere_s and beside.damage_s + load.queue_s <= load.slack_s


@dataclass(frozen=True, slots=True, kw_only=True)
class StayQuestion:
    """A request whose prompt has just been computed here. `there_tpot_s`: predicted on the best decode worker, its share of
    transfer and wait for room included; `prompt_slack_s`: what the prompts that wait here can lose until one is late."""

    tpot_s: float
    there_tpot_s: float
    context_tokens: int
    output_tokens: float
    room_tokens: float
    prompt_slack_s: float


def stays(time: StepTime, here: StreamLoad, question: StayQuestion) -> bool:
    """Whether it decodes where it was prefilled: the decode side cannot keep its objective, this worker can, and neither the
    streams nor the prompts here miss theirs for it. A stream loses some of every step; a prompt that comes waits for one step."""
    if question.there_tpot_s <= question.tpot_s or question.context_tokens + question.output_tokens > question.room_tokens:
        return False
    alone_s = time.decode.seconds(here.sequences, here.kv_tokens) if here.sequences else 0.0
    with_s = time.decode.seconds(here.sequences + 1, here.kv_tokens + question.context_tokens)
    prompts_s = here.queue_s / max(1.0, question.output_tokens)
    if with_s + prompts_s > question.tpot_s:
        return False
    marginal_s = with_s - alone_s if here.sequences else max(0.0, with_s - time.prefill.base_s)
    harm_s = question.output_tokens * marginal_s
    return harm_s <= here.slack_s and with_s <= question.prompt_slack_s
