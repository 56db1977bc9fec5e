"""Who waits for blocks, and in what order they get them: streams first, oldest first; then prompts, as the queue's policy says.

A follower is passed over while its leader's prompt is not computed. Where the first one does not fit, none is let in: the
order may change with time, but a small prompt that slips past a large one would keep it waiting for ever.
"""

from bisect import insort
from collections.abc import Callable, Iterator

from common.mesh.sequence import Sequence
from common.policy.prefill_queue import BatchLimits, PrefillOrder, PrefillQueue
from common.policy.queued_prompt import QueuedPrompt
from common.policy.step_time import PrefillTime
from common.values.errors import InvariantBroken


class WaitingLine:
    """`most_tokens`: of one step. `waits_for_leader` says of a follower whether it still must."""

    def __init__(self, order: PrefillOrder, most_tokens: int, waits_for_leader: Callable[[Sequence], bool]) -> None:
        self._most_tokens = most_tokens
        self._waits_for_leader = waits_for_leader
        self._time = PrefillTime(base_s=0.0, per_token_s=0.0)
        self._sequences: dict[int, Sequence] = {}
        self._streams: list[Sequence] = []
        self._followers: list[tuple[Sequence, int]] = []
        self._queue = PrefillQueue(order, self._time, self._limits())

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences.values())

    @property
    def work_s(self) -> float:
        """Predicted seconds of the prompts that wait."""
        return self._queue.work_s

    @property
    def batch_tokens(self) -> int:
        """Up to here a step of several prompts gains throughput."""
        return self._limits().max_tokens

    def learn(self, time: PrefillTime) -> None:
        """What prompts take, for those that come from now on."""
        self._time = time
        self._queue.retime(time, self._limits())

    def _limits(self) -> BatchLimits:
        known = self._time.per_token_s > 0.0
        return BatchLimits(max_tokens=min(self._most_tokens, self._time.saturation_tokens) if known else self._most_tokens)

    def push(self, sequence: Sequence, known_tokens: int) -> None:
        """`known_tokens` of it are in the prefix cache."""
        self._sequences[sequence.arrived] = sequence
        if sequence.goes_first:
            insort(self._streams, sequence, key=lambda s: s.arrived)
        elif self._waits_for_leader(sequence):
            self._followers.append((sequence, known_tokens))
        else:
            self._queue.push(self._prompt(sequence, known_tokens))

    def remove(self, sequence: Sequence) -> None:
        del self._sequences[sequence.arrived]
        if sequence in self._streams:
            self._streams.remove(sequence)
        else:
            self._queue.remove(sequence.arrived)
            self._followers = [follower for follower in self._followers if follower[0] is not sequence]

    def release_followers(self) -> None:
        """Those whose leader's prompt is computed wait like others from now on."""
        ready = [follower for follower in self._followers if not self._waits_for_leader(follower[0])]
        if ready:
            self._followers = [follower for follower in self._followers if follower not in ready]
            for sequence, known_tokens in ready:
                self._queue.push(self._prompt(sequence, known_tokens))

    def first_stream(self) -> Sequence | None:
        return next((stream for stream in self._streams if not self._waits_for_leader(stream)), None)

    def first_prompt(self, now: float) -> QueuedPrompt | None:
        return self._queue.peek(now)

    def sequence_of(self, prompt: QueuedPrompt) -> Sequence:
        return self._sequences[prompt.handle]

    def next_batch(self, now: float, *, alone: bool) -> list[QueuedPrompt]:
        """The prompts of the next step, in order. Each is then either removed, or put back."""
        return self._queue.next_batch(now, alone=alone)

    def put_back(self, prompt: QueuedPrompt) -> None:
        """There was no room for it."""
        self._queue.push(prompt)

    def _prompt(self, sequence: Sequence, known_tokens: int) -> QueuedPrompt:
        tokens = len(sequence.tokens) - known_tokens
        promise = sequence.job.promise
        return QueuedPrompt(
            handle=sequence.arrived,
            tokens=tokens,
            past=known_tokens,
            arrived_at=sequence.stamps.came_at,
            deadline=sequence.deadline,
            work_s=self._time.seconds(tokens, known_tokens),
            gives_way=promise.gives_way or promise.best_effort,
        )

    def check_invariants(self) -> None:
        lines = [s.arrived for s in self._streams] + [s.arrived for s, _ in self._followers]
        lines += [prompt.handle for prompt in self._queue.waiting()]
        if sorted(lines) != sorted(self._sequences):
            raise InvariantBroken("who waits is in no line, or in two")
