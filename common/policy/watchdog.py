"""When silence means that somebody is lost: bounds from the latency that is wanted, the steps that were measured, and how
regularly a worker was heard before.

Being wrong costs work, never tokens: what was taken for lost is fenced by the attempt. So the bound is short: about a second
and a few steps. A busy host is heard irregularly while all is well; its bound grows with the gaps that it has shown.
"""

from dataclasses import dataclass

from common.values.slo import Slo

LEAST_PROBE_S = 0.25
LEAST_LOST_S = 1.0
MOST_LOST_S = 10.0
TOKENS_OF_SILENCE = 10
GAPS = 2.0
STEPS = 4.0
ANSWER_SHARE = 0.35
LEAST_ANSWER_S = 0.3
CLOCK_MARGIN_S = 0.01
SUSPECT_FACTOR = 3.0
"""Who loses a worker while it is the announced suspect there ends for good: that is not decided on one second of silence."""
LIST_EVERY_S = 1.0
LISTS = 3.0
BEAT_EVERY_S = LIST_EVERY_S
"""How often a process tells its supervisor that it lives, and a supervised server is asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchdogBounds:
    """A stream that is silent for `probe_after_s` is asked for; the answer is given `answer_within_s`. A worker that leaves a
    question unanswered and was not heard in any way for `lost_after_s` is taken for lost."""

    probe_after_s: float
    answer_within_s: float
    lost_after_s: float


def stream_bounds(slo: Slo, *, step_s: float, gap_s: float) -> WatchdogBounds:
    """`step_s` is a step's usual time at that worker, `gap_s` the longest pause in which it was not heard lately."""
    steps = STEPS * step_s
    lost = min(MOST_LOST_S, max(LEAST_LOST_S, TOKENS_OF_SILENCE * slo.tpot_s, GAPS * gap_s) + steps)
    return WatchdogBounds(
        probe_after_s=max(LEAST_PROBE_S, steps),
        answer_within_s=max(LEAST_ANSWER_S, ANSWER_SHARE * lost),
        lost_after_s=lost,
    )


def question_s(bounds: WatchdogBounds, *, silent_s: float) -> float:
    """How long a question may stay open at a worker that has been silent for so long: the last one before the bound ends with
    it, so that a loss is noticed at the bound and not one question later."""
    left = bounds.lost_after_s - silent_s
    if left > bounds.answer_within_s + LEAST_ANSWER_S:
        return bounds.answer_within_s
    return max(LEAST_ANSWER_S, left + CLOCK_MARGIN_S)


def peer_silent_after_s(*, step_s: float) -> float:
    """A peer says at least what it holds, each second; after this it is frozen, or cut off."""
    return min(MOST_LOST_S, LISTS * LIST_EVERY_S + STEPS * step_s)


def process_frozen_after_s() -> float:
    """A supervisor replaces a process that left out its heartbeats for so long. Beats come from the event loop, whatever a step
    takes. To replace costs more than to go around, which gateways and peers have done by then: hence the factor."""
    return min(MOST_LOST_S, SUSPECT_FACTOR * LISTS * BEAT_EVERY_S)
