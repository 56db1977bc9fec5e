"""Whether an urgent prompt goes between two chunks of a long one.

Between chunks nothing is lost but the fixed cost of one more step: the long prompt keeps its blocks and goes on later. So what
counts is only whether more prompts are on time.
"""

from dataclasses import dataclass

from common.policy.queued_prompt import QueuedPrompt
from common.policy.step_time import PrefillTime


@dataclass(frozen=True, slots=True, kw_only=True)
class Interrupted:
    """The prompt that is being computed, as it stands between two chunks."""

    rest_tokens: int
    past: int
    deadline: float


def preempts(running: Interrupted, urgent: QueuedPrompt, time: PrefillTime, chunk_tokens: int, now: float) -> bool:
    """True where going first makes the urgent prompt on time and takes no other one's place: it would be late behind the
    rest of the running one, and the running one is on time behind it, or late either way.

    Where only one of the two can be on time, the running one goes on: it has been paid for already.
    """
    rest_s = time.chunked_s(running.rest_tokens, running.past, chunk_tokens)
    if now + rest_s + urgent.work_s <= urgent.deadline or now + urgent.work_s > urgent.deadline:
        return False
    late_anyway = now + rest_s > running.deadline
    return late_anyway or now + urgent.work_s + rest_s <= running.deadline


def chunk_tokens_for(time: PrefillTime, longest_wait_s: float) -> int:
    """The longest first chunk after which an urgent prompt need not have waited longer than that; at least the length below
    which a step's fixed cost is most of it, since smaller chunks would be spent on overhead."""
    least = max(1, time.saturation_tokens // 8)
    spare = longest_wait_s - time.base_s
    if spare <= 0.0 or time.per_token_s <= 0.0:
        return least
    low, high = least, max(least, int(spare / time.per_token_s))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if time.seconds(middle) <= longest_wait_s else (low, middle - 1)
    return low
