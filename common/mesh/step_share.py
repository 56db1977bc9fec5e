"""What goes into the next step: decode rows first, then prompts, in the order and the amounts that policy says.

A prompt gets its blocks only when its turn comes, so that the order stays open until then. Between two chunks of a long prompt
an urgent one may go first; the long one keeps a share of the steps all the same.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from common.mesh.sequence import Sequence
from common.mesh.stream_pace import pace_of
from common.mesh.waiting_line import WaitingLine
from common.policy.batching import StepLimits
from common.policy.chunk_beside import chunk_tokens_beside
from common.policy.prefill_preemption import Interrupted, preempts
from common.policy.step_time import StepTime

MOST_PASSED_OVER = 9
"""Steps in a row that may go to urgent prompts while a begun one stands: it keeps a tenth of them."""


@dataclass(slots=True, kw_only=True)
class Share:
    """Of one step. `budget` positions are left for prompts; `room` more sequences may be started."""

    budget: int
    room: int
    granted: dict[int, int] = field(default_factory=dict)
    prompt_tokens: int = 0

    def grant(self, sequence: Sequence, wanted: int) -> None:
        count = min(wanted, self.budget)
        if count > 0:
            self.granted[sequence.handle] = count
            self.budget -= count
            self.prompt_tokens += count


class StepShare:
    """`start` finds the blocks for a waiting sequence, or says no; `has_blocks` asks; `wanted` are the positions that
    could be planned for one."""

    def __init__(
        self,
        line: WaitingLine,
        limits: StepLimits,
        *,
        start: Callable[[Sequence], bool],
        has_blocks: Callable[[Sequence], bool],
        wanted: Callable[[Sequence], int],
        interrupts: bool,
    ) -> None:
        self._line = line
        self._limits = limits
        self._start_blocks = start
        self._has_blocks = has_blocks
        self._wanted = wanted
        self._interrupts = interrupts
        self._begun = 0

    def share(self, running: Seq[Sequence], time: StepTime, now: float, *, room: int, may_admit: bool) -> dict[int, int]:
        """Handle → positions. `running` by age; nobody is started unless `may_admit`."""
        wanted = [(sequence, self._wanted(sequence)) for sequence in running]
        rows = [sequence for sequence, count in wanted if count == 1][: self._limits.max_tokens]
        begun = [sequence for sequence, count in wanted if count > 1]
        share = Share(budget=self._limits.max_tokens - len(rows), room=room, granted={row.handle: 1 for row in rows})
        if not begun and not (may_admit and self._line):
            return share.granted
        waits = self._let_streams_in(begun, share) if may_admit else True
        self._limit_chunk(rows, begun, share, time, now)
        if begun:
            self._serve_begun(begun, share, time, now, may_admit=not waits)
        if not waits:
            self._begin_prompts(share, now)
        return share.granted

    def _let_streams_in(self, begun: list[Sequence], share: Share) -> bool:
        """Streams that lost their blocks, or came with tokens, get theirs at once. True: one must wait, and so must all others."""
        self._line.release_followers()
        while (stream := self._line.first_stream()) is not None:
            if not self._start(stream, share):
                return True
            if self._wanted(stream):
                begun.append(stream)
        return False

    def _limit_chunk(self, rows: Seq[Sequence], begun: Seq[Sequence], share: Share, time: StepTime, now: float) -> None:
        """Beside streams a prompt gets what they can lose."""
        streams = [row for row in rows if row.new_tokens]
        if not streams or share.budget < 1:
            return
        first = min(begun, key=_turn, default=None)
        head = self._line.first_prompt(now) if first is None else None
        tokens, past = (first.unplanned, first.planned) if first is not None else (head.tokens, head.past) if head else (0, 0)
        if tokens:
            pace = pace_of(streams, time, now)
            share.budget = chunk_tokens_beside(time, pace.load, pace.tpot_s, tokens=tokens, past=past, most=share.budget)

    def _serve_begun(self, begun: list[Sequence], share: Share, time: StepTime, now: float, *, may_admit: bool) -> None:
        urgent = self._urgent(min(begun, key=_turn), share, time, now) if may_admit and self._interrupts else None
        if urgent is not None:
            begun.append(urgent)
        for sequence in sorted(begun, key=_turn):
            count = self._wanted(sequence)
            if count > 1 or not share.granted.get(sequence.handle):
                share.grant(sequence, count)
            passed = urgent is not None and sequence.handle not in share.granted
            sequence.passed_over = sequence.passed_over + 1 if passed else 0

    def _urgent(self, running: Sequence, share: Share, time: StepTime, now: float) -> Sequence | None:
        """A waiting prompt that goes before the begun one, started."""
        head = self._line.first_prompt(now)
        if head is None or running.goes_first or running.passed_over >= MOST_PASSED_OVER or share.budget < 1:
            return None
        stands = Interrupted(rest_tokens=running.unplanned, past=running.planned, deadline=running.deadline)
        if not preempts(stands, head, time.prefill, share.budget, now):
            return None
        started = self._start_next(share, now, alone=True)
        return started[0] if started else None

    def _begin_prompts(self, share: Share, now: float) -> None:
        """A batch where the step is free; else whole prompts, while they still gain from the step that runs anyway."""
        if not share.prompt_tokens:
            self._grant_all(self._start_next(share, now, alone=False), share)
            return
        while (head := self._line.first_prompt(now)) is not None:
            if head.tokens > share.budget or share.prompt_tokens + head.tokens > self._line.batch_tokens:
                return
            started = self._start_next(share, now, alone=True)
            if not started:
                return
            self._grant_all(started, share)

    def _start_next(self, share: Share, now: float, *, alone: bool) -> list[Sequence]:
        """Take the next batch, or its first prompt, out of the line. Where the first has no room, nobody is taken."""
        head = self._line.first_prompt(now)
        if head is None or share.budget < 1 or share.room < 1 or not self._has_blocks(self._line.sequence_of(head)):
            return []
        started: list[Sequence] = []
        batch = self._line.next_batch(now, alone=alone)
        tokens = 0
        for index, prompt in enumerate(batch):
            sequence = self._line.sequence_of(prompt)
            if tokens >= share.budget or not self._start(sequence, share):
                for left in batch[index:]:
                    self._line.put_back(left)
                break
            tokens += prompt.tokens
            started.append(sequence)
        return started

    def _grant_all(self, sequences: Seq[Sequence], share: Share) -> None:
        for sequence in sequences:
            share.grant(sequence, self._wanted(sequence))

    def _start(self, sequence: Sequence, share: Share) -> bool:
        if share.room < 1 or not self._start_blocks(sequence):
            return False
        share.room -= 1
        self._begun += 1
        sequence.begun = self._begun
        self._line.remove(sequence)
        return True


def _turn(sequence: Sequence) -> tuple[bool, int]:
    """Streams that are computed again come first, oldest first; of prompts the one that was begun last: it is the urgent one."""
    return (not sequence.goes_first, sequence.arrived if sequence.goes_first else -sequence.begun)
