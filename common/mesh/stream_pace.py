"""What the streams of an engine can lose until one of them misses its objective, and how long they will go on.

A stream that has missed its objective whatever happens, or was promised nothing, is protected no more than by the least chunk.
"""

import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from common.mesh.sequence import Sequence
from common.policy.free_placement import StreamLoad, stream_slack_s
from common.policy.output_length import FIRST_GUESS_SHARE
from common.policy.step_time import StepTime


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPace:
    """`load` of the streams that decode, with the least slack of those that can meet their objective (infinite: none);
    `tpot_s` is the tightest objective among these."""

    load: StreamLoad
    tpot_s: float
    tokens_left: float


def tokens_left(sequence: Sequence) -> float:
    """What it is expected to make yet; one that is past its prediction goes on as long again (lengths are heavy-tailed)."""
    most = max(1, sequence.job.sampling.max_tokens - sequence.new_tokens)
    expected = sequence.job.promise.expected_tokens
    guess = FIRST_GUESS_SHARE * sequence.job.sampling.max_tokens if expected is None else float(expected)
    left = guess - sequence.new_tokens if sequence.new_tokens < guess else float(max(1, sequence.new_tokens))
    return min(float(most), max(1.0, left))


def pace_of(streams: Seq[Sequence], time: StepTime, now: float) -> StreamPace:
    kv_tokens = float(sum(len(stream.tokens) for stream in streams))
    step_s = time.decode.seconds(len(streams), kv_tokens) if streams else 0.0
    slack_s = tightest_s = math.inf
    for tpot_s, stream_s in _slacks(streams, step_s, now):
        slack_s, tightest_s = min(slack_s, stream_s), min(tightest_s, tpot_s)
    left = sum(tokens_left(stream) for stream in streams) / len(streams) if streams else 0.0
    return StreamPace(
        load=StreamLoad(sequences=len(streams), kv_tokens=kv_tokens, slack_s=slack_s), tpot_s=tightest_s, tokens_left=left
    )


def _slacks(streams: Iterable[Sequence], step_s: float, now: float) -> Iterable[tuple[float, float]]:
    """Objective and slack of each stream that is to meet one and still can."""
    for stream in streams:
        promise, stamps = stream.job.promise, stream.stamps
        if promise.tpot_s is None or promise.best_effort or stamps.paced_from is None:
            continue
        slack_s = stream_slack_s(
            tpot_s=promise.tpot_s,
            decoded=stream.new_tokens - stamps.paced_tokens,
            spent_s=now - stamps.paced_from,
            left=tokens_left(stream),
            step_s=step_s,
        )
        if slack_s >= 0.0:
            yield promise.tpot_s, slack_s
