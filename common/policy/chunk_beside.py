"""How many tokens of a prompt go into a step beside running streams (as in Sarathi-Serve, but from what the streams can lose).

Where they can lose the whole prompt and still meet their objectives, it goes as quickly as a step may: the damage is the
same however it is cut. Where they cannot, chunks are so small that every stream keeps its pace, though never smaller than
what is worth a step's fixed cost: a prompt is not starved by streams.
"""

from common.policy.free_placement import StreamLoad, prefill_beside
from common.policy.prefill_preemption import chunk_tokens_for
from common.policy.step_time import StepTime


def chunk_tokens_beside(time: StepTime, load: StreamLoad, tpot_s: float, *, tokens: int, past: int, most: int) -> int:
    """Of the `tokens` that are left of a prompt after `past`, at most `most`. `tpot_s` is the tightest stream's objective."""
    if not load.sequences or time.prefill.per_token_s <= 0.0 or most < 1:
        return most
    damage_s = prefill_beside(time, load, tokens=tokens, past=past, step_tokens=most + load.sequences).damage_s
    if damage_s <= load.slack_s:
        return most
    spare_s = tpot_s - time.beside_s(load.sequences, load.kv_tokens)
    return min(most, chunk_tokens_for(time.prefill, time.prefill.base_s + spare_s))
