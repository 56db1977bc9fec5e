"""Which worker a phase of a request goes to, in predicted seconds; and the rules that do without a prediction, as baselines.

Prefill costs queue + the part that is not cached + the transfer afterwards: a conversation's next turn goes where its prefix is,
unless the queue there is longer than computing the prefix again. Decode costs the step time that the request would
see, stretched where its tokens will not fit.
"""

import math
from collections.abc import Callable
from typing import Literal, Protocol, assert_never

from common.policy.step_time import DecodeTime, PrefillTime

PlacementRule = Literal["least_seconds", "power_of_two", "join_shortest_queue", "round_robin", "random"]
ALIKE = 1.05
"""Predictions this near to the least are the same: measured step times differ by as much, and what is alike is to be spread."""


class Draws(Protocol):
    """Where chance comes from: `random.Random` is one."""

    def randrange(self, stop: int, /) -> int: ...


def choose_site(
    rule: PlacementRule,
    sites: int,
    *,
    cost: Callable[[int], float],
    waiting: Callable[[int], int],
    turn: int,
    draws: Draws,
) -> int:
    """The index of the site that takes the request. `cost` is in seconds, `waiting` counts requests there, `turn` counts
    choices so far. By seconds, of sites alike the one with fewest requests. Ties go to the lower index. Only the costs that
    the rule needs are asked for."""
    if sites < 1:
        raise ValueError("no site to choose from")
    if sites == 1:
        return 0
    match rule:
        case "least_seconds":
            costs = [cost(site) for site in range(sites)]
            near = ALIKE * min(costs)
            return min((site for site in range(sites) if costs[site] <= near), key=waiting)
        case "power_of_two":
            one = draws.randrange(sites)
            other = (one + 1 + draws.randrange(sites - 1)) % sites
            return min(sorted((one, other)), key=cost)
        case "join_shortest_queue":
            return min(range(sites), key=waiting)
        case "round_robin":
            return turn % sites
        case "random":
            return draws.randrange(sites)
        case _:
            assert_never(rule)


def prefill_cost_s(time: PrefillTime, *, queue_s: float, prompt_tokens: int, cached_tokens: int = 0, transfer_s: float = 0.0) -> float:
    """Seconds until the prompt would be computed and handed over. At least one token is always computed."""
    cached = min(cached_tokens, prompt_tokens - 1)
    return queue_s + time.seconds(prompt_tokens - cached, cached) + transfer_s


def decode_cost_s(
    time: DecodeTime,
    *,
    sequences: int,
    kv_tokens: float,
    context_tokens: int,
    output_tokens: float,
    room_tokens: float,
) -> float:
    """Predicted seconds a token with the request on board, its share of the wait for room included.

    `sequences` and `kv_tokens` of those that run or wait there, `room_tokens` still unreserved. Those that run are taken to
    leave evenly while the request would make `output_tokens`, so a shortfall of a tenth of what they hold is a wait of a
    tenth of that time. Infinite where it can never fit.
    """
    step_s = time.seconds(sequences + 1, kv_tokens + context_tokens)
    shortfall = context_tokens + output_tokens - room_tokens
    if shortfall <= 0.0:
        return step_s
    if shortfall > kv_tokens:
        return math.inf if sequences == 0 else step_s * (1.0 + shortfall / max(1.0, kv_tokens))
    return step_s * (1.0 + shortfall / kv_tokens)
