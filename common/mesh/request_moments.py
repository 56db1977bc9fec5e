"""The moments of a request's timeline, from what its gateway saw and the stages that its workers stamped.

Clocks of two hosts are never compared: the stages are durations, set around the first token's arrival at the gateway, so the ways
between the processes count to the stages beside them.
"""

from collections.abc import Mapping


def moments(*, end_s: float, first_token_s: float | None, stages: Mapping[str, float]) -> dict[str, float]:
    """Seconds since the request was accepted, in their order; a moment that no stage tells of is left out."""
    known = {"end": end_s}
    if first_token_s is None:
        return known
    known["first_token"] = first_token_s
    if "prefill" in stages:
        known["prefill_started"] = max(0.0, first_token_s - stages["prefill"])
    if "transfer" in stages or "decode_queue" in stages:
        known["transferred"] = min(end_s, first_token_s + stages.get("transfer", 0.0))
        known["decode_started"] = min(end_s, known["transferred"] + stages.get("decode_queue", 0.0))
    return known
