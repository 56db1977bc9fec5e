"""The engine as its worker sees it: sequences in, tokens and filled blocks out, steps in between.

Pure: `plan` decides what the next step computes, `complete` takes its result; the shell carries plans to a StepEngine and
results back. While a step of decode rows alone is under way, the next one may be planned already (its tokens stay inside the
step engine), so that nothing of ours stands between two steps; a prompt that waits is never delayed by that. The simulator
runs this class with step times instead of a StepEngine.
"""

from bisect import insort
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace

from common.mesh.engine_values import (
    BlocksFilled,
    EngineEvent,
    EngineLoad,
    FilledBlock,
    Landing,
    Preempted,
    SequenceJob,
    TokensMade,
    Verdict,
)
from common.mesh.sequence import Phase, Sequence
from common.policy.batching import StepLimits, share_budget
from common.policy.block_hash import extend_hashes, root_hash
from common.policy.block_pool import BlockPool
from common.policy.preemption import Candidate, choose_victim
from common.policy.prefix_log import PrefixLog
from common.values.errors import InvariantBroken
from common.values.ids import SequenceKey
from common.values.kv_layout import Fingerprint
from common.values.step import RowResult, SequenceStart, StepPlan, StepResult, StepRow
from common.values.tokens import Ending, NewTokens

STEPS_AHEAD = 2


class SequenceEngine:
    """`max_waiting` bounds the queue; `eos_token_ids` end a sequence unless its sampling ignores them."""

    def __init__(
        self,
        *,
        fingerprint: Fingerprint,
        pool: BlockPool,
        limits: StepLimits,
        max_model_len: int,
        eos_token_ids: tuple[int, ...],
        max_waiting: int = 1024,
    ) -> None:
        self._fingerprint = fingerprint
        self._layout = fingerprint.layout
        self._pool = pool
        self._limits = limits
        self._max_model_len = max_model_len
        self._eos = frozenset(eos_token_ids)
        self._max_waiting = max_waiting
        self._sequences: dict[SequenceKey, Sequence] = {}
        self._waiting: list[Sequence] = []
        self._abandoned: dict[int, Sequence] = {}
        self._pinned: dict[int, Sequence] = {}
        self._ends: list[int] = []
        self._under_way: deque[tuple[StepPlan, list[Sequence]]] = deque()
        self._handles = 0
        self._steps = 0
        self._preempted_since: list[Preempted] = []
        self._preemptions = self._prefix_hit_tokens = self._computed_tokens = 0

    # ------------------------------------------------------------------ commands

    def has_room_to_queue(self, sequences: int) -> bool:
        return len(self._waiting) + sequences <= self._max_waiting

    def can_ever_fit(self, prompt_tokens: int, max_tokens: int) -> bool:
        """Whether a sequence of that size could run to its end in an empty pool."""
        positions = min(prompt_tokens + max_tokens, self._max_model_len)
        return self._layout.blocks_for(positions) <= self._pool.total

    def submit(self, job: SequenceJob) -> Verdict:
        """Queue a sequence. `full`: the queue is at its bound. `never_fits`: not even in an empty pool."""
        if job.key in self._sequences:
            raise InvariantBroken(f"{job.key} is here already")
        if not self.can_ever_fit(len(job.prompt), job.sampling.max_tokens):
            return "never_fits"
        if len(self._waiting) >= self._max_waiting:
            return "full"
        sequence = self._make(job)
        self._enqueue(sequence)
        return "accepted"

    def reserve(self, job: SequenceJob, positions: int) -> Landing | None:
        """Take blocks for `positions` imported positions plus one block to decode into; pin what is known already.

        None where there is no room now, or where what was preempted waits for it. The sequence is then nobody's victim
        until `activate` or `release`.
        """
        if job.key in self._sequences:
            raise InvariantBroken(f"{job.key} is here already")
        if len(self._active()) >= self._limits.max_sequences or any(s.preempted for s in self._waiting):
            return None
        sequence = self._make(job)
        known = self._known_prefix(sequence, positions)
        needed = min(self._layout.blocks_for(positions) + 1, self._pool.total) - len(known)
        if self._pool.evictable_outside(known) < needed:
            return None
        self._pool.share(known)
        sequence.blocks = known + self._pool.allocate(needed)
        sequence.named = len(known)
        sequence.phase = Phase.LANDING
        self._sequences[job.key] = sequence
        return Landing(first_block=len(known), blocks=tuple(sequence.blocks))

    def activate(self, key: SequenceKey, given: Seq[int], *, good_positions: int) -> None:
        """The import is over: `given` are all new tokens so far; positions from `good_positions` on are computed here."""
        sequence = self._sequences[key]
        if sequence.phase is not Phase.LANDING:
            raise InvariantBroken(f"activate of {key}, which is {sequence.phase}")
        sequence.tokens = [*sequence.job.prompt, *given]
        sequence.computed = sequence.planned = min(good_positions, len(sequence.tokens) - 1)
        sequence.phase = Phase.RUNNING
        self._name_full_blocks(sequence)

    def hand_over(self, key: SequenceKey) -> None:
        """Let a running sequence stop after its next token, with its blocks final, as if it had come to be handed off."""
        sequence = self._sequences[key]
        sequence.job = replace(sequence.job, hand_off=True)
        sequence.reported = 0

    def keep(self, key: SequenceKey) -> None:
        """The hand-off came to nothing: decode here."""
        sequence = self._sequences[key]
        sequence.job = _without_hand_off(sequence.job)
        if sequence.phase is Phase.HELD and sequence.pins:
            sequence.keep_when_unpinned = True
        elif sequence.phase is Phase.HELD:
            sequence.phase = Phase.RUNNING

    def release(self, key: SequenceKey) -> None:
        """Forget a sequence, whatever it does now; its full blocks stay as cache. Unknown keys are ignored."""
        sequence = self._sequences.pop(key, None)
        if sequence is None:
            return
        if sequence.phase is Phase.WAITING:
            self._waiting.remove(sequence)
        self._preempted_since = [event for event in self._preempted_since if event.key != key]
        sequence.released = True
        if not sequence.in_flight and not sequence.pins:
            self._free(sequence)

    def pin(self, key: SequenceKey) -> int:
        """Somebody works on this sequence's blocks (seals them): they stay taken and unchanged until `unpin`."""
        sequence = self._sequences[key]
        sequence.pins += 1
        self._pinned[sequence.handle] = sequence
        return sequence.handle

    def unpin(self, handle: int) -> None:
        sequence = self._pinned[handle]
        sequence.pins -= 1
        if sequence.pins:
            return
        del self._pinned[handle]
        if sequence.released and not sequence.in_flight:
            self._free(sequence)
        elif sequence.keep_when_unpinned:
            sequence.keep_when_unpinned = False
            sequence.phase = Phase.RUNNING

    def next_suspect(self) -> SequenceKey | None:
        """The oldest suspect that has its blocks and waits to be cleared for its first row."""
        return next((s.job.key for s in self._by_age() if s.barred and s.phase is Phase.RUNNING), None)

    def make_suspect(self, key: SequenceKey) -> None:
        """From its next row on; one that is a suspect already stays as it is."""
        sequence = self._sequences[key]
        sequence.barred = sequence.barred or not sequence.suspect
        sequence.suspect = True

    @property
    def cleared_suspects(self) -> list[SequenceKey]:
        return [s.job.key for s in self._sequences.values() if s.suspect and not s.barred]

    def clear_suspect(self, key: SequenceKey) -> None:
        """It was announced: it may take part in steps. Unknown keys are ignored."""
        sequence = self._sequences.get(key)
        if sequence is not None:
            sequence.barred = False

    def bar_suspect(self, key: SequenceKey) -> bool:
        """Keep a suspect out of steps again, where it has lost its blocks; False where it holds some."""
        sequence = self._sequences.get(key)
        if sequence is None or sequence.phase is not Phase.WAITING:
            return False
        sequence.barred = sequence.suspect
        return True

    def abandon(self, key: SequenceKey) -> int:
        """Like `release` for a landing into which a copy still runs: its blocks stay taken until `reclaim`."""
        sequence = self._sequences.pop(key)
        if sequence.phase is not Phase.LANDING:
            raise InvariantBroken(f"abandon of {key}, which is {sequence.phase}")
        self._abandoned[sequence.handle] = sequence
        return sequence.handle

    def reclaim(self, handle: int) -> None:
        """The copy into an abandoned landing has returned."""
        self._free(self._abandoned.pop(handle))

    # ------------------------------------------------------------------ steps

    def plan(self) -> StepPlan | None:
        """The next step, or None where there is nothing to compute now. At most STEPS_AHEAD steps are under way."""
        if len(self._under_way) >= STEPS_AHEAD:
            raise InvariantBroken(f"{STEPS_AHEAD} steps are under way")
        if self._under_way and not self._may_run_ahead():
            return None
        for sequence in self._by_age():  # running streams get their next block before newcomers take the last ones
            if sequence.phase is Phase.RUNNING and self._wanted(sequence) == 1:
                self._cover(sequence, sequence.planned + 1)
        if not self._under_way:
            self._admit_waiting()
        running = [s for s in self._by_age() if s.phase is Phase.RUNNING]
        granted = share_budget([self._wanted(s) for s in running], self._limits)
        chosen: list[tuple[Sequence, int]] = []
        for sequence, count in zip(running, granted, strict=True):
            if count and sequence.phase is Phase.RUNNING:
                if self._cover(sequence, sequence.planned + count):
                    chosen.append((sequence, count))
                elif self._under_way:
                    return None  # who is in flight cannot be preempted: let the step end first
        return self._take_step([(s, count) for s, count in chosen if s.phase is Phase.RUNNING])

    def _take_step(self, chosen: list[tuple[Sequence, int]]) -> StepPlan | None:
        if not chosen:
            return None
        self._steps += 1
        plan = StepPlan(
            number=self._steps,
            rows=tuple(self._row(s, count) for s, count in chosen),
            starts=tuple(self._announce(s) for s, _ in chosen if not s.announced),
            ends=tuple(self._ends),
        )
        self._ends.clear()
        for row, (sequence, count) in zip(plan.rows, chosen, strict=True):
            sequence.planned += count
            sequence.in_flight += 1
            sequence.samples_in_flight += row.sample
        self._under_way.append((plan, [sequence for sequence, _ in chosen]))
        return plan

    def complete(self, result: StepResult) -> list[EngineEvent]:
        """Take the result of the oldest step; what happened, first tokens before filled blocks."""
        if not self._under_way or self._under_way[0][0].number != result.number:
            raise InvariantBroken(f"result of step {result.number}, which is not the next to end")
        plan, sequences = self._under_way.popleft()
        events: list[EngineEvent] = [*self._preempted_since]
        self._preempted_since.clear()
        filled: list[EngineEvent] = []
        for row, sequence, outcome in zip(plan.rows, sequences, result.rows, strict=True):
            sequence.in_flight -= 1
            sequence.samples_in_flight -= row.sample
            if sequence.released:
                if not sequence.in_flight and not sequence.pins:
                    self._free(sequence)
                continue
            self._computed_tokens += row.count
            events.extend(self._apply(sequence, row, outcome))
            if not sequence.released:
                filled.extend(self._report_filled(sequence))
        return events + filled

    # ------------------------------------------------------------------ state

    @property
    def may_plan(self) -> bool:
        """Whether `plan` may be called now."""
        return len(self._under_way) < STEPS_AHEAD

    @property
    def idle(self) -> bool:
        return not (self._sequences or self._abandoned or self._pinned or self._under_way)

    @property
    def prefix_log(self) -> PrefixLog:
        return self._pool.prefix_log

    def holds(self, key: SequenceKey) -> bool:
        return key in self._sequences

    def phase(self, key: SequenceKey) -> Phase | None:
        sequence = self._sequences.get(key)
        return None if sequence is None else sequence.phase

    def load(self) -> EngineLoad:
        active = self._active()
        queued = sum(s.remaining for s in self._waiting) + sum(s.remaining for s in active if s.remaining > 1)
        return EngineLoad(
            waiting=len(self._waiting),
            running=sum(1 for s in active if s.phase is Phase.RUNNING),
            held=sum(1 for s in active if s.phase in (Phase.HELD, Phase.LANDING)),
            queued_tokens=queued,
            blocks_free=self._pool.free,
            blocks_cached=self._pool.cached,
            blocks_leased=self._blocks_leased(),
            blocks_total=self._pool.total,
            preemptions=self._preemptions,
            prefix_hit_tokens=self._prefix_hit_tokens,
            computed_tokens=self._computed_tokens,
        )

    def _blocks_leased(self) -> int:
        between = [s for s in self._sequences.values() if s.phase in (Phase.HELD, Phase.LANDING)]
        return len({b for s in (*between, *self._abandoned.values(), *self._pinned.values()) for b in s.blocks})

    def check_invariants(self) -> None:
        """Conservation: every held block belongs to a sequence, and an idle engine holds none."""
        self._pool.check_invariants()
        if any(s.phase is Phase.WAITING and s.blocks for s in self._sequences.values()):
            raise InvariantBroken("a waiting sequence holds blocks")
        if sorted(s.arrived for s in self._waiting) != [s.arrived for s in self._waiting]:
            raise InvariantBroken("the queue is out of order")
        for sequence in self._active():
            if sequence.computed > len(sequence.tokens) or len(sequence.blocks) < self._layout.blocks_for(sequence.computed):
                raise InvariantBroken(f"{sequence.job.key} has computed more than it has tokens or blocks for")
        zombies = [s for _, sequences in self._under_way for s in sequences if s.released]
        owners = (*self._sequences.values(), *self._abandoned.values(), *self._pinned.values(), *zombies)
        owned = {b for s in owners for b in s.blocks}
        if len(owned) != self._pool.held:
            raise InvariantBroken(f"{self._pool.held} blocks are held, but sequences own {len(owned)}")

    # ------------------------------------------------------------------ private

    def _make(self, job: SequenceJob) -> Sequence:
        self._handles += 1
        return Sequence(
            job=job,
            arrived=self._handles,
            handle=self._handles,
            tokens=[*job.prompt, *job.given],
            root=root_hash(self._fingerprint, job.salt),
            suspect=job.suspect,
            barred=job.suspect,
        )

    def _enqueue(self, sequence: Sequence) -> None:
        self._sequences[sequence.job.key] = sequence
        insort(self._waiting, sequence, key=lambda s: s.arrived)

    def _active(self) -> list[Sequence]:
        return [s for s in self._sequences.values() if s.phase is not Phase.WAITING]

    def _by_age(self) -> list[Sequence]:
        return sorted(self._sequences.values(), key=lambda s: s.arrived)

    def _known_prefix(self, sequence: Sequence, positions: int) -> list[int]:
        """Blocks known here that hold the first `positions` positions of the sequence or fewer, full blocks only."""
        full = positions // self._layout.block_size
        extend_hashes(sequence.hashes, sequence.root, sequence.tokens, self._layout.block_size, full)
        return self._pool.match(sequence.hashes[:full])

    def _may_run_ahead(self) -> bool:
        """Only behind a step of decode rows, and only where no prompt could go into the next one."""
        decodes = all(row.count == 1 for row in self._under_way[-1][0].rows)
        prompts = any(s.remaining > 1 and not s.barred for s in self._active() if s.phase is Phase.RUNNING)
        return decodes and not self._waiting and not prompts

    def _wanted(self, sequence: Sequence) -> int:
        """Positions that could be planned now; none for a sequence that will end, or be held, with what is under way,
        or for a suspect that was not announced."""
        if sequence.barred:
            return 0
        drawn = sequence.samples_in_flight
        sampling = sequence.job.sampling
        ends = sequence.new_tokens + drawn >= sampling.max_tokens or len(sequence.tokens) + drawn >= self._max_model_len
        return 0 if drawn and (ends or sequence.job.hand_off) else sequence.unplanned

    def _admit_waiting(self) -> None:
        """First come, first served; a follower is passed over while its leader's prompt is not computed."""
        room = self._limits.max_sequences - len(self._active())
        for sequence in list(self._waiting):
            if room <= 0:
                return
            if self._must_wait_for_leader(sequence):
                continue
            if not self._start(sequence):
                return
            room -= 1

    def _must_wait_for_leader(self, sequence: Sequence) -> bool:
        leader = self._sequences.get(sequence.job.after) if sequence.job.after is not None else None
        return leader is not None and leader.computed < leader.prompt_length

    def _start(self, sequence: Sequence) -> bool:
        """Blocks for all of the sequence's tokens and the next one, or nothing. The last token is always computed again,
        since its logits are needed; prompt log-probabilities need every position."""
        known = [] if sequence.wants_prompt_logprobs else self._known_prefix(sequence, len(sequence.tokens) - 1)
        total = self._layout.blocks_for(min(len(sequence.tokens) + 1, self._max_model_len))
        needed = total - len(known)
        if self._pool.evictable_outside(known) < needed:
            return False
        self._pool.share(known)
        sequence.blocks = known + self._pool.allocate(needed)
        sequence.computed = sequence.planned = len(known) * self._layout.block_size
        sequence.named = len(known)
        self._prefix_hit_tokens += sequence.computed
        sequence.phase = Phase.RUNNING
        self._waiting.remove(sequence)
        return True

    def _cover(self, sequence: Sequence, positions: int) -> bool:
        """Make the block table reach `positions`; preempts others where the pool is full. False: wait for a later step."""
        missing = self._layout.blocks_for(positions) - len(sequence.blocks)
        while missing > 0 and not self._pool.can_allocate(missing):
            victim = self._choose_victim()
            if victim is None:
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        if missing > 0:
            sequence.blocks += self._pool.allocate(missing)
        return True

    def _choose_victim(self) -> Sequence | None:
        running = [s for s in self._sequences.values() if s.phase is Phase.RUNNING]
        handle = choose_victim([Candidate(handle=s.handle, arrived=s.arrived, protected=_is_protected(s)) for s in running])
        return next((s for s in running if s.handle == handle), None)

    def _preempt(self, sequence: Sequence) -> None:
        self._free(sequence)
        self._handles += 1
        sequence.handle = self._handles
        sequence.announced = False
        sequence.preempted = True
        sequence.phase = Phase.WAITING
        sequence.computed = sequence.planned = sequence.named = sequence.reported = 0
        sequence.prompt_logprobs.clear()
        insort(self._waiting, sequence, key=lambda s: s.arrived)
        self._preemptions += 1
        self._preempted_since.append(Preempted(key=sequence.job.key))

    def _free(self, sequence: Sequence) -> None:
        self._pool.release(sequence.blocks)
        sequence.blocks = []
        if sequence.announced:
            self._ends.append(sequence.handle)

    def _row(self, sequence: Sequence, count: int) -> StepRow:
        return StepRow(
            handle=sequence.handle,
            start=sequence.planned,
            count=count,
            blocks=tuple(sequence.blocks),
            sample=count == sequence.unplanned,
            prompt_logprobs=sequence.wants_prompt_logprobs and sequence.planned < sequence.prompt_length,
        )

    def _announce(self, sequence: Sequence) -> SequenceStart:
        sequence.announced = True
        return SequenceStart(
            handle=sequence.handle,
            choice=sequence.job.key.choice,
            prompt_length=sequence.prompt_length,
            tokens=tuple(sequence.tokens),
            sampling=sequence.job.sampling,
            eos_token_ids=tuple(sorted(self._eos)),
        )

    def _apply(self, sequence: Sequence, row: StepRow, outcome: RowResult) -> Iterator[EngineEvent]:
        if outcome.fault is not None:
            ending = Ending(reason="error", error_code="sequence_fault", error_message=outcome.fault)
            yield self._end(sequence, NewTokens(first=sequence.new_tokens, tokens=(), ending=ending))
            return
        sequence.prompt_logprobs.extend(outcome.prompt_logprobs)
        sequence.computed += row.count
        self._name_full_blocks(sequence)
        if not row.sample:
            return
        if outcome.token is None:
            raise InvariantBroken(f"step {row.handle}: a row that samples has no token")
        new = self._extend(sequence, outcome.token, outcome)
        if new.ending is not None:
            yield self._end(sequence, new)
            return
        if sequence.job.hand_off and not sequence.in_flight:
            sequence.phase = Phase.HELD
        yield TokensMade(key=sequence.job.key, new=new)

    def _extend(self, sequence: Sequence, token: int, outcome: RowResult) -> NewTokens:
        first = sequence.new_tokens
        prompt_logprobs = tuple(sequence.prompt_logprobs) if sequence.wants_prompt_logprobs else None
        sequence.tokens.append(token)
        sequence.suspect = False
        return NewTokens(
            first=first,
            tokens=(token,),
            logprobs=(outcome.logprobs,) if outcome.logprobs is not None else (),
            prompt_logprobs=prompt_logprobs,
            ending=self._ending(sequence, token),
        )

    def _ending(self, sequence: Sequence, token: int) -> Ending | None:
        sampling = sequence.job.sampling
        if token in sampling.stop_token_ids or (token in self._eos and not sampling.ignore_eos):
            return Ending(reason="stop", stop_token=token)
        if sequence.new_tokens >= sampling.max_tokens or len(sequence.tokens) >= self._max_model_len:
            return Ending(reason="length")
        return None

    def _end(self, sequence: Sequence, new: NewTokens) -> TokensMade:
        self.release(sequence.job.key)
        return TokensMade(key=sequence.job.key, new=new)

    def _name_full_blocks(self, sequence: Sequence) -> None:
        full = sequence.computed // self._layout.block_size
        extend_hashes(sequence.hashes, sequence.root, sequence.tokens, self._layout.block_size, full)
        for index in range(sequence.named, full):
            self._pool.name(sequence.blocks[index], sequence.hashes[index])
        sequence.named = max(sequence.named, full)

    def _report_filled(self, sequence: Sequence) -> Iterator[EngineEvent]:
        """Blocks of a prompt that is to be handed off: full ones after each chunk, the last one when the prompt is done."""
        if not sequence.job.hand_off:
            return
        size = self._layout.block_size
        positions = min(sequence.computed, len(sequence.tokens))
        complete = sequence.phase is Phase.HELD
        last = self._layout.blocks_for(positions) if complete else positions // size
        if last > sequence.reported or complete:
            blocks = tuple(
                FilledBlock(
                    index=i,
                    block=sequence.blocks[i],
                    valid=min(size, positions - i * size),
                    generation=self._pool.generation(sequence.blocks[i]),
                )
                for i in range(sequence.reported, last)
            )
            sequence.reported = last
            yield BlocksFilled(key=sequence.job.key, blocks=blocks, complete=complete)


def _is_protected(sequence: Sequence) -> bool:
    """Its blocks are written in a step, worked on outside, or offered to a peer."""
    return sequence.in_flight > 0 or sequence.pins > 0 or (sequence.job.hand_off and sequence.reported > 0)


def _without_hand_off(job: SequenceJob) -> SequenceJob:
    return replace(job, hand_off=False)
