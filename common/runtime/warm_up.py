"""A worker's first steps, before anybody waits for them: the first request pays for nothing, and the worker knows what steps take.

A short prompt and a token, twice: pages are touched and kernels chosen in the first round, the second one is believed. Where
this host was calibrated the calibration says more; else a model is drawn through the two points, for the steps that are served
to correct.
"""

import msgspec

from common.policy.step_time import DecodeLine, DecodeTime, PrefillTime, StepTime
from common.ports.step_engine import StepEngine
from common.runtime.worker_engine import WorkerModel
from common.values.sampling import SamplingParameters
from common.values.step import SequenceStart, StepPlan, StepRow

WARM_UP_TOKENS = 48
ROUNDS = 2
LEAST_S = 1e-6
FIXED_SHARE = 0.5
"""Of a short prompt's step, at most, that its tokens have no part in."""
ROW_SHARE = 0.1
"""Of a step of one row that every further row is taken to cost."""


async def warm_up(step_engine: StepEngine, model: WorkerModel) -> StepTime:
    """In the first blocks of a pool that nobody uses yet."""
    length = min(WARM_UP_TOKENS, model.card.max_model_len - 2, (model.blocks - 1) * model.layout.block_size)
    blocks = tuple(range(model.layout.blocks_for(length + 1)))
    prefill_s = decode_s = LEAST_S
    for handle in range(ROUNDS):
        start = SequenceStart(
            handle=handle,
            choice=0,
            prompt_length=length,
            tokens=tuple(i % model.card.vocab_size for i in range(length)),
            sampling=SamplingParameters(max_tokens=2, seed=0),
            eos_token_ids=(),
        )
        prompt = StepRow(handle=handle, start=0, count=length, blocks=blocks, sample=True)
        plans = (
            StepPlan(number=3 * handle + 1, rows=(prompt,), starts=(start,)),
            StepPlan(number=3 * handle + 2, rows=(msgspec.structs.replace(prompt, start=length, count=1),)),
            StepPlan(number=3 * handle + 3, rows=(), ends=(handle,)),
        )
        prefill_s, decode_s, _ = [max(LEAST_S, (await step_engine.result(step_engine.submit(plan))).duration_s) for plan in plans]
    return drawn_through(prefill_s, decode_s, tokens=length)


def drawn_through(prefill_s: float, decode_s: float, *, tokens: int) -> StepTime:
    """The step-time model of one prompt of that many tokens and one decode row."""
    base_s = min(decode_s * (1.0 - ROW_SHARE), prefill_s * FIXED_SHARE)
    line = DecodeLine(base_s=decode_s * (1.0 - ROW_SHARE), per_kv_token_s=0.0, per_sequence_s=decode_s * ROW_SHARE)
    return StepTime(
        prefill=PrefillTime(base_s=base_s, per_token_s=(prefill_s - base_s) / max(1, tokens)),
        decode=DecodeTime(line=line),
    )
