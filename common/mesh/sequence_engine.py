"""The engine as its worker sees it: sequences in, tokens and filled blocks out, steps in between.

Pure: `plan` decides what the next step computes, `complete` takes its result; the shell carries plans to a StepEngine and
results back. While a step of decode rows alone is under way, the next one may be planned already (its tokens stay inside the
step engine), so that nothing of ours stands between two steps; a prompt that waits is never delayed by that. The simulator
runs this class with step times instead of a StepEngine.
"""

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import replace

from common.mesh.engine_load import blocks_owned, leased_blocks, pace
from common.mesh.engine_values import EngineEvent, EngineLoad, EnginePace, Landing, Preempted, SequenceJob, Verdict
from common.mesh.sequence import Sequence, Stamps
from common.mesh.sequence_blocks import SequenceBlocks, victim_among
from common.mesh.sequence_life import Phase
from common.mesh.step_outcome import StepOutcome
from common.mesh.step_share import StepShare
from common.mesh.step_speed import StepSpeed
from common.mesh.waiting_line import WaitingLine
from common.policy.batching import StepLimits
from common.policy.block_hash import root_hash
from common.policy.block_pool import BlockPool
from common.policy.prefill_queue import PrefillOrder
from common.policy.prefix_log import PrefixLog
from common.policy.step_time import UNKNOWN_STEP_TIME, StepTime
from common.values.errors import InvariantBroken
from common.values.ids import SequenceKey
from common.values.kv_layout import Fingerprint
from common.values.step import SequenceStart, StepPlan, StepResult, StepRow

STEPS_AHEAD = 2
ACCEPTED_FACTOR = 2
"""How many times the bound of the queue may wait here with those that a worker had accepted before."""


class SequenceEngine:
    """`max_waiting` bounds the queue; `eos_token_ids` end a sequence unless its sampling ignores them. `order` is that of
    prompts that wait."""

    def __init__(
        self,
        *,
        fingerprint: Fingerprint,
        pool: BlockPool,
        limits: StepLimits,
        max_model_len: int,
        eos_token_ids: tuple[int, ...],
        max_waiting: int = 1024,
        order: PrefillOrder = "feasible_first",
    ) -> None:
        self._fingerprint = fingerprint
        self._blocks = SequenceBlocks(pool, fingerprint.layout, max_model_len)
        self._limits = limits
        self._max_model_len = max_model_len
        self._eos_token_ids = tuple(sorted(eos_token_ids))
        self._max_waiting = max_waiting
        self._sequences: dict[SequenceKey, Sequence] = {}
        self._line = WaitingLine(order, limits.max_tokens, self._must_wait_for_leader)
        self._share = StepShare(
            self._line,
            limits,
            start=self._start,
            has_blocks=self._blocks.has_room_for,
            wanted=self._wanted,
            interrupts=order in ("feasible_first", "edf"),
        )
        self._outcome = StepOutcome(self._blocks, frozenset(eos_token_ids), max_model_len)
        self._speed: StepSpeed | None = None
        self._abandoned: dict[int, Sequence] = {}
        self._pinned: dict[int, Sequence] = {}
        self._ends: list[int] = []
        self._under_way: deque[tuple[StepPlan, list[Sequence]]] = deque()
        self._handles = self._steps = 0
        self._preempted_since: list[Preempted] = []
        self._preemptions = self._computed_tokens = 0

    # ------------------------------------------------------------------ commands

    def has_room_to_queue(self, sequences: int, *, accepted_before: bool = False) -> bool:
        """New requests leave the second half of the room to those that were accepted and lost their worker: these would
        otherwise compete for each place with arrivals, and those of several choices would never find places enough at once."""
        most = ACCEPTED_FACTOR * self._max_waiting if accepted_before else self._max_waiting
        return len(self._line) + sequences <= most

    def can_ever_fit(self, prompt_tokens: int, max_tokens: int) -> bool:
        """Whether a sequence of that size could run to its end in an empty pool."""
        positions = min(prompt_tokens + max_tokens, self._max_model_len)
        return self._blocks.layout.blocks_for(positions) <= self._blocks.pool.total

    def start_from(self, time: StepTime) -> None:
        """What steps take here, as far as it is known before any was run; the steps that are run correct it."""
        self._speed = StepSpeed(time)
        self._line.learn(time.prefill)

    def submit(self, job: SequenceJob, now: float) -> Verdict:
        """Queue a sequence. `full`: the queue is at its bound. `never_fits`: not even in an empty pool."""
        if job.key in self._sequences:
            raise InvariantBroken(f"{job.key} is here already")
        if not self.can_ever_fit(len(job.prompt), job.sampling.max_tokens):
            return "never_fits"
        if not self.has_room_to_queue(1, accepted_before=job.accepted_before):
            return "full"
        sequence = self._make(job, now, Phase.WAITING)
        self._sequences[job.key] = sequence
        self._line.push(sequence, self._blocks.known_tokens(sequence))
        return "accepted"

    def reserve(self, job: SequenceJob, positions: int) -> Landing | None:
        """Take blocks for `positions` imported positions plus one block to decode into; pin what is known already.

        None where there is no room now, or where what was preempted waits for it. The sequence is then nobody's victim
        until `activate` or `release`; its stamps come with the former.
        """
        if job.key in self._sequences:
            raise InvariantBroken(f"{job.key} is here already")
        if len(self._active()) >= self._limits.max_sequences or any(s.preempted for s in self._line):
            return None
        sequence = self._make(job, 0.0, Phase.LANDING)
        if not self._blocks.reserve(sequence, positions):
            return None
        self._sequences[job.key] = sequence
        return Landing(first_block=sequence.named, blocks=tuple(sequence.blocks))

    def activate(self, key: SequenceKey, given: Seq[int], *, good_positions: int, stamps: Stamps) -> None:
        """The import is over: `given` are all new tokens so far; positions from `good_positions` on are computed here."""
        sequence = self._sequences[key]
        sequence.step("activate")
        sequence.tokens = [*sequence.job.prompt, *given]
        sequence.computed = sequence.planned = min(good_positions, len(sequence.tokens) - 1)
        sequence.stamps = stamps
        self._blocks.name_full(sequence)

    def hand_over(self, key: SequenceKey) -> None:
        """Let a running sequence stop after its next token, with its blocks final, as if it had come to be handed off."""
        sequence = self._sequences[key]
        sequence.job = replace(sequence.job, hand_off=True)
        sequence.reported = 0

    def keep(self, key: SequenceKey) -> None:
        """The hand-off came to nothing: decode here."""
        sequence = self._sequences[key]
        sequence.job = replace(sequence.job, hand_off=False)
        if sequence.phase is Phase.HELD and sequence.pins:
            sequence.keep_when_unpinned = True
        elif sequence.phase is Phase.HELD:
            sequence.step("keep")

    def release(self, key: SequenceKey) -> None:
        """Forget a sequence, whatever it does now; its full blocks stay as cache. Unknown keys are ignored."""
        sequence = self._sequences.pop(key, None)
        if sequence is None:
            return
        if sequence.phase is Phase.WAITING:
            self._line.remove(sequence)
        self._preempted_since = [event for event in self._preempted_since if event.key != key]
        sequence.step("release")
        self._free_at_rest(sequence)

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
        if sequence.released:
            self._free_at_rest(sequence)
        elif sequence.keep_when_unpinned:
            sequence.keep_when_unpinned = False
            sequence.step("keep")

    def abandon(self, key: SequenceKey) -> int:
        """Like `release` for a landing into which a copy still runs: its blocks stay taken until `reclaim`."""
        sequence = self._sequences[key]
        sequence.step("abandon")
        del self._sequences[key]
        self._abandoned[sequence.handle] = sequence
        return sequence.handle

    def reclaim(self, handle: int) -> None:
        """The copy into an abandoned landing has returned."""
        sequence = self._abandoned.pop(handle)
        sequence.step("reclaim")
        self._free(sequence)

    # ------------------------------------------------------------------ suspects

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

    # ------------------------------------------------------------------ steps

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None where there is nothing to compute now. At most STEPS_AHEAD steps are under way."""
        if len(self._under_way) >= STEPS_AHEAD:
            raise InvariantBroken(f"{STEPS_AHEAD} steps are under way")
        if self._under_way and not self._may_run_ahead():
            return None
        for sequence in self._running():  # running streams get their next block before newcomers take the last ones
            if sequence.phase is Phase.RUNNING and self._wanted(sequence) == 1:
                self._cover(sequence, sequence.planned + 1)
        room = self._limits.max_sequences - len(self._active())
        may_admit = not self._under_way and room > 0
        granted = self._share.share(self._running(), self.step_time, now, room=room, may_admit=may_admit)
        chosen: list[tuple[Sequence, int]] = []
        for sequence in self._running():
            count = granted.get(sequence.handle, 0)
            if count and sequence.phase is Phase.RUNNING:
                if self._cover(sequence, sequence.planned + count):
                    chosen.append((sequence, count))
                elif self._under_way:
                    return None  # who is in flight cannot be preempted: let the step end first
        return self._take_step([(s, count) for s, count in chosen if s.phase is Phase.RUNNING], now)

    def _take_step(self, chosen: list[tuple[Sequence, int]], now: float) -> StepPlan | None:
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
            if sequence.stamps.begun_at is None:
                sequence.stamps.begun_at = now
        self._under_way.append((plan, [sequence for sequence, _ in chosen]))
        return plan

    def complete(self, result: StepResult, now: float) -> list[EngineEvent]:
        """Take the result of the oldest step; what happened, first tokens before filled blocks."""
        if not self._under_way or self._under_way[0][0].number != result.number:
            raise InvariantBroken(f"result of step {result.number}, which is not the next to end")
        plan, sequences = self._under_way.popleft()
        if self._speed is not None and self._speed.observe(plan, result, now):
            self._line.learn(self._speed.current.prefill)
        events: list[EngineEvent] = [*self._preempted_since]
        self._preempted_since.clear()
        filled: list[EngineEvent] = []
        for row, sequence, outcome in zip(plan.rows, sequences, result.rows, strict=True):
            sequence.in_flight -= 1
            sequence.samples_in_flight -= row.sample
            if sequence.released:
                self._free_at_rest(sequence)
                continue
            self._computed_tokens += row.count
            made = self._outcome.apply(sequence, row, outcome, now)
            if made is not None:
                events.append(made)
            if made is not None and made.new.ending is not None:
                self.release(sequence.job.key)
            else:
                filled.extend(self._outcome.filled(sequence))
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
        return self._blocks.pool.prefix_log

    @property
    def step_time(self) -> StepTime:
        return UNKNOWN_STEP_TIME if self._speed is None else self._speed.current

    @property
    def steps_refused(self) -> int:
        """Steps that the step-time model did not believe."""
        return 0 if self._speed is None else self._speed.refused

    @property
    def knows_its_speed(self) -> bool:
        return self._speed is not None

    def holds(self, key: SequenceKey) -> bool:
        return key in self._sequences

    def phase(self, key: SequenceKey) -> Phase | None:
        sequence = self._sequences.get(key)
        return None if sequence is None else sequence.phase

    def paced_from(self, key: SequenceKey) -> float | None:
        """When the sequence's stream began, where it did."""
        sequence = self._sequences.get(key)
        return None if sequence is None else sequence.stamps.paced_from

    def pace(self, now: float) -> EnginePace:
        return pace(self._sequences.values(), self._line.work_s, self.step_time, self._blocks, now)

    def load(self) -> EngineLoad:
        active, pool = self._active(), self._blocks.pool
        queued = sum(s.remaining for s in self._line) + sum(s.remaining for s in active if s.remaining > 1)
        return EngineLoad(
            waiting=len(self._line),
            running=sum(1 for s in active if s.phase is Phase.RUNNING),
            held=sum(1 for s in active if s.phase in (Phase.HELD, Phase.LANDING)),
            queued_tokens=queued,
            blocks_free=pool.free,
            blocks_cached=pool.cached,
            blocks_leased=leased_blocks(self._owners()),
            blocks_total=pool.total,
            preemptions=self._preemptions,
            prefix_hit_tokens=self._blocks.prefix_hit_tokens,
            computed_tokens=self._computed_tokens,
        )

    def check_invariants(self) -> None:
        """Conservation: every held block belongs to a sequence, and an idle engine holds none."""
        self._blocks.pool.check_invariants()
        self._line.check_invariants()
        for sequence in self._owners():
            sequence.check_invariants()
        if {s.arrived for s in self._line} != {s.arrived for s in self._sequences.values() if s.phase is Phase.WAITING}:
            raise InvariantBroken("who waits is not in line, or who is in line does not wait")
        if any(self._blocks.missing(s, s.computed) > 0 for s in self._active()):
            raise InvariantBroken("a sequence has computed more than it has blocks for")
        zombies = [s for _, sequences in self._under_way for s in sequences if s.released]
        owned = blocks_owned((*self._owners(), *zombies))
        if len(owned) != self._blocks.pool.held:
            raise InvariantBroken(f"{self._blocks.pool.held} blocks are held, but sequences own {len(owned)}")

    # ------------------------------------------------------------------ private

    def _make(self, job: SequenceJob, now: float, phase: Phase) -> Sequence:
        self._handles += 1
        return Sequence(
            job=job,
            arrived=self._handles,
            handle=self._handles,
            tokens=[*job.prompt, *job.given],
            root=root_hash(self._fingerprint, job.salt),
            stamps=Stamps(came_at=now),
            phase=phase,
            suspect=job.suspect,
            barred=job.suspect,
        )

    def _owners(self) -> tuple[Sequence, ...]:
        return (*self._sequences.values(), *self._abandoned.values(), *self._pinned.values())

    def _active(self) -> list[Sequence]:
        return [s for s in self._sequences.values() if s.phase is not Phase.WAITING]

    def _by_age(self) -> list[Sequence]:
        return sorted(self._sequences.values(), key=lambda s: s.arrived)

    def _running(self) -> list[Sequence]:
        return [s for s in self._by_age() if s.phase is Phase.RUNNING]

    def _may_run_ahead(self) -> bool:
        """Only behind a step of decode rows, and only where no prompt could go into the next one."""
        decodes = all(row.count == 1 for row in self._under_way[-1][0].rows)
        prompts = any(s.remaining > 1 and not s.barred for s in self._active() if s.phase is Phase.RUNNING)
        return decodes and not len(self._line) and not prompts

    def _wanted(self, sequence: Sequence) -> int:
        """Positions that could be planned now; none for a sequence that will end, or be held, with what is under way,
        or for a suspect that was not announced."""
        if sequence.barred:
            return 0
        drawn = sequence.samples_in_flight
        sampling = sequence.job.sampling
        ends = sequence.new_tokens + drawn >= sampling.max_tokens or len(sequence.tokens) + drawn >= self._max_model_len
        return 0 if drawn and (ends or sequence.job.hand_off) else sequence.unplanned

    def _must_wait_for_leader(self, sequence: Sequence) -> bool:
        leader = self._sequences.get(sequence.job.after) if sequence.job.after is not None else None
        return leader is not None and leader.computed < leader.prompt_length

    def _start(self, sequence: Sequence) -> bool:
        """Out of the line, with its blocks; or not, where there is no room."""
        if not self._blocks.start(sequence):
            return False
        sequence.step("start")
        return True

    def _cover(self, sequence: Sequence, positions: int) -> bool:
        """Make the block table reach `positions`; preempts others where the pool is full. False: wait for a later step."""
        missing = self._blocks.missing(sequence, positions)
        while missing > 0 and not self._blocks.pool.can_allocate(missing):
            victim = victim_among(s for s in self._sequences.values() if s.phase is Phase.RUNNING)
            if victim is None:
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        if missing > 0:
            self._blocks.extend(sequence, missing)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        sequence.step("preempt")
        self._free(sequence)
        self._handles += 1
        sequence.handle = self._handles
        sequence.announced = False
        sequence.preempted = True
        sequence.computed = sequence.planned = sequence.named = sequence.reported = 0
        sequence.prompt_logprobs.clear()
        self._line.push(sequence, 0)
        self._preemptions += 1
        self._preempted_since.append(Preempted(key=sequence.job.key))

    def _free_at_rest(self, sequence: Sequence) -> None:
        if sequence.at_rest:
            self._free(sequence)

    def _free(self, sequence: Sequence) -> None:
        self._blocks.free(sequence)
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
            eos_token_ids=self._eos_token_ids,
        )
