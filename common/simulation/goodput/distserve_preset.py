"""The workers of DistServe's simulator: OPT-13B on an A100, as its published profile has them.

The coefficients are those of the profile `profiler-a100-80g.distserve.json` of LLMServe/DistServe (Apache-2.0), with the
overheads that its workers add to every step (2 ms and 0.1 µs a token of context, 1 ms a prefill). It counts no transfer, makes every
output token by a decode step, and divides TPOT by all of them. A quadratic term in a prompt's length is ours times two.
"""

from dataclasses import replace

from common.policy.prefill_queue import BatchLimits
from common.policy.step_time import DecodeLine, DecodeTime, PrefillTime, StepTime
from common.simulation.goodput.deployment import Deployment, Policies

STEP_OVERHEAD_S = 2e-3
TOKEN_OVERHEAD_S = 1e-7
PREFILL_OVERHEAD_S = 1e-3
KV_TOKENS = 66_144
"""Of one A100-80G, after the weights."""

_PREFILL_MS = (18.10254647486372, 0.1019122572698738, 7.122264314252114e-06)
_SMALL_BATCH_MS = (19.934702624895458, 0.0006269356524350583, 0.03850697740828398)
_LARGE_BATCH_MS = (7.1661889468253595, 0.0005798000403396046, 0.15831096191764046)
_KNEE = 95


def opt_13b() -> StepTime:
    """The profile alone, for other simulations."""
    base, token, square = (value / 1000.0 for value in _PREFILL_MS)
    prefill = PrefillTime(base_s=base, per_token_s=token, per_pair_s=2.0 * square)
    return StepTime(prefill=prefill, decode=DecodeTime(line=_line(_SMALL_BATCH_MS), knee=_KNEE, beyond=_line(_LARGE_BATCH_MS)))


def distserve_deployment(*, prefill: int = 1, decode: int = 1) -> Deployment:
    """Its workers and its policies: first come first served, the shortest queue, batches of any size."""
    profile = opt_13b()
    beyond = profile.decode.beyond
    step_time = StepTime(
        prefill=replace(
            profile.prefill,
            base_s=profile.prefill.base_s + PREFILL_OVERHEAD_S + STEP_OVERHEAD_S,
            per_token_s=profile.prefill.per_token_s + TOKEN_OVERHEAD_S,
        ),
        decode=DecodeTime(
            line=_with_overhead(profile.decode.line),
            knee=profile.decode.knee,
            beyond=None if beyond is None else _with_overhead(beyond),
        ),
    )
    return Deployment(
        prefill=prefill,
        decode=decode,
        step_time=step_time,
        batch=BatchLimits(max_tokens=KV_TOKENS),
        policies=Policies(order="fcfs", prefill_rule="join_shortest_queue", decode_rule="join_shortest_queue"),
        first_token_counts=False,
    )


def _line(milliseconds: tuple[float, float, float]) -> DecodeLine:
    base, kv_token, sequence = (value / 1000.0 for value in milliseconds)
    return DecodeLine(base_s=base, per_kv_token_s=kv_token, per_sequence_s=sequence)


def _with_overhead(line: DecodeLine) -> DecodeLine:
    """Its overhead counts the context without the token that the step makes: one less a sequence."""
    return DecodeLine(
        base_s=line.base_s + STEP_OVERHEAD_S,
        per_kv_token_s=line.per_kv_token_s + TOKEN_OVERHEAD_S,
        per_sequence_s=line.per_sequence_s - TOKEN_OVERHEAD_S,
    )
