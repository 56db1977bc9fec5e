"""Drives one sequence engine through a random schedule of jobs, hand-offs, imports, releases and steps, asserting as it goes.

The step underneath is the shadow engine, which checks on every step that what is read is this sequence's own content.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from common.mesh.engine_values import BlocksFilled, EngineEvent, FilledBlock, Landing, Preempted, SequenceJob, TokensMade
from common.mesh.sequence import Stamps
from common.mesh.sequence_engine import SequenceEngine
from common.mesh.sequence_life import Phase
from common.policy.batching import StepLimits
from common.policy.block_pool import BlockPool
from common.simulation.shadow_kv import EOS, FAULTY_SEED, ShadowKv, ShadowStep, chain, logprob_of, reference
from common.values.ids import RequestId, SequenceKey
from common.values.kv_layout import Fingerprint, KvLayout
from common.values.sampling import SamplingParameters
from common.values.tokens import Ending, NewTokens

BLOCK = 4
MAX_MODEL_LEN = 40
STEPS_TO_THE_END = 3000


def make_engine(
    kv: ShadowKv, *, max_tokens: int = 16, max_sequences: int = 4, max_waiting: int = 64
) -> tuple[SequenceEngine, BlockPool]:
    layout = KvLayout(layers=1, kv_heads=1, head_dim=1, block_size=BLOCK)
    pool = BlockPool(len(kv.generations), kv.generations)
    engine = SequenceEngine(
        fingerprint=Fingerprint(weights="w", dtype="float32", layout=layout),
        pool=pool,
        limits=StepLimits(max_tokens=max_tokens, max_sequences=max_sequences),
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=EOS,
        max_waiting=max_waiting,
    )
    return engine, pool


@dataclass
class Run:
    """What the driver knows of a sequence: its job, what it should make, what it has made."""

    job: SequenceJob
    expected: list[int]
    expected_ending: Ending
    tokens: list[int] = field(default_factory=list)
    ending: Ending | None = None
    landing: Landing | None = None
    sealed_blocks: int = 0


@dataclass
class Seal:
    pin: int
    blocks: tuple[FilledBlock, ...]


class Driver:
    """One schedule: everything that happens is drawn from `random`."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.kv = ShadowKv(random.randint(4, 14), BLOCK)
        self.step = ShadowStep(self.kv)
        self.max_waiting = random.randint(1, 8)
        self.engine, self.pool = make_engine(
            self.kv, max_tokens=random.randint(1, 24), max_sequences=random.randint(1, 6), max_waiting=self.max_waiting
        )
        self.runs: dict[SequenceKey, Run] = {}
        self.prompts: list[tuple[int, ...]] = []
        self.seals: list[Seal] = []
        self.abandoned: list[tuple[int, Landing, dict[int, int]]] = []
        self.number = 0
        self.now = 0.0

    def do_something(self) -> None:
        """One event of those that can happen now; steps more often than others."""
        could: list[tuple[Callable[[], object], int, bool]] = [
            (self.submit, 3, True),
            (self.reserve, 1, True),
            (self.activate, 2, bool(self.landings())),
            (self.abandon, 1, bool(self.landings())),
            (self.reclaim, 1, bool(self.abandoned)),
            (self.release, 1, bool(self.runs)),
            (self.keep, 2, any(run.job.hand_off for run in self.runs.values())),
            (self.seal, 3, bool(self.seals)),
            (self.plan, 8, self.engine.may_plan),
            (self.complete, 8, self.step.busy),
        ]
        events = [event for event in could if event[2]]
        self.random.choices([event[0] for event in events], [event[1] for event in events])[0]()
        self.sound()

    # ------------------------------------------------------------------ jobs

    def draw_job(self, *, imported: bool) -> tuple[SequenceJob, Run]:
        random = self.random
        self.number += 1
        prefix = random.choice([(), *self.prompts])
        cut = random.choice([0, len(prefix), random.randint(0, len(prefix))])
        fresh = random.choices(range(3), k=random.randint(cut == 0, random.choice([2, 18])))
        prompt = (*prefix[:cut], *fresh)[:30]
        self.prompts = [*self.prompts[-5:], prompt]
        sampling = SamplingParameters(
            max_tokens=random.choice([1, 2, 5, 12, 20]),
            seed=random.choice([1, 1, 1, 2, FAULTY_SEED]),
            ignore_eos=random.random() < 0.7,
            stop_token_ids=random.choice([(), (), (3, 4, 5)]),
            prompt_logprobs=random.choice([None, None, 1]),
            logprobs=random.choice([None, 0]),
        )
        choice = random.randint(0, 1)
        expected, ending = reference(prompt, sampling, choice, MAX_MODEL_LEN)
        most = len(expected) - (ending.reason != "error")  # the token that ends a sequence is never given
        given = tuple(expected[: random.choice([0, 0, 0, random.randint(0, most)])])
        key = SequenceKey(RequestId(f"r{self.number}"), choice)
        twins = [k for k, run in self.runs.items() if run.job.prompt == prompt and not imported]
        after = random.choice([None, *twins])
        hand_off = not imported and random.random() < 0.3
        job = SequenceJob(
            key=key,
            prompt=prompt,
            sampling=sampling,
            given=given,
            hand_off=hand_off,
            after=after,
            accepted_before=random.random() < 0.2,
        )
        return job, Run(job=job, expected=expected, expected_ending=ending, tokens=list(given))

    def submit(self) -> None:
        job, run = self.draw_job(imported=False)
        waiting = self.engine.load().waiting
        verdict = self.engine.submit(job, self.now)
        positions = min(len(job.prompt) + job.sampling.max_tokens, MAX_MODEL_LEN)
        if -(-positions // BLOCK) > self.pool.total:
            assert verdict == "never_fits"
        else:
            bound = self.max_waiting * (2 if job.accepted_before else 1)
            assert verdict == ("full" if waiting >= bound else "accepted")
        if verdict == "accepted":
            self.runs[job.key] = run

    def reserve(self) -> None:
        """An import: positions are the prompt and what was given; the first new token comes with `activate`."""
        job, run = self.draw_job(imported=True)
        if len(run.expected) <= len(job.given) or not self.engine.can_ever_fit(len(job.prompt), job.sampling.max_tokens):
            return
        run.landing = self.engine.reserve(job, len(job.prompt) + len(job.given))
        if run.landing is None:
            assert not self.engine.holds(job.key)
            return
        values = chain([*job.prompt, *job.given])
        assert len(run.landing.blocks) * BLOCK >= len(values) + 1
        for position in range(run.landing.first_block * BLOCK):
            assert self.kv.read(run.landing.blocks, position) == values[position], "a pinned block has another content"
        self.runs[job.key] = run

    def landings(self) -> list[Run]:
        return [run for run in self.runs.values() if run.landing is not None]

    def activate(self) -> None:
        run = self.random.choice(self.landings())
        self.do_activate(run, good_blocks=self.random.choice([0, 1, 2, 12]))

    def do_activate(self, run: Run, *, good_blocks: int) -> None:
        landing, job = run.landing, run.job
        assert landing is not None
        run.landing = None
        positions = len(job.prompt) + len(job.given)
        good = min(max(good_blocks, landing.first_block) * BLOCK, positions)
        values = chain([*job.prompt, *job.given])
        for position in range(landing.first_block * BLOCK, positions):
            self.kv.write(landing.blocks, position, values[position] if position < good else -1)
        run.tokens = run.expected[: len(job.given) + 1]
        if len(run.tokens) == len(run.expected) and run.expected_ending.reason != "error":
            self.forget(run)  # its sender would have ended it
            return
        self.engine.activate(job.key, run.tokens, good_positions=good, stamps=Stamps(came_at=self.now))

    def abandon(self) -> None:
        run = self.random.choice(self.landings())
        assert run.landing is not None
        generations = {block: self.kv.generations[block] for block in run.landing.blocks}
        self.abandoned.append((self.engine.abandon(run.job.key), run.landing, generations))
        del self.runs[run.job.key]

    def reclaim(self) -> None:
        """The copy writes once more, and is back."""
        handle, landing, generations = self.abandoned.pop(0)
        for block in landing.blocks[landing.first_block :]:
            assert self.kv.generations[block] == generations[block], "a landing block was given away under a copy"
            self.kv.spoil(block)
        self.engine.reclaim(handle)

    # ------------------------------------------------------------------ the end of a sequence

    def release(self) -> None:
        self.forget(self.random.choice(list(self.runs.values())))

    def forget(self, run: Run) -> None:
        self.engine.release(run.job.key)
        self.runs.pop(run.job.key, None)

    def keep(self) -> None:
        run = self.random.choice([run for run in self.runs.values() if run.job.hand_off])
        self.engine.keep(run.job.key)

    def seal(self) -> None:
        self.do_seal(self.seals.pop(self.random.randrange(len(self.seals))))

    def do_seal(self, seal: Seal) -> None:
        for block in seal.blocks:
            assert self.kv.generations[block.block] == block.generation, "a block was given away while it was sealed"
            self.kv.seal(block.block, block.valid)
        self.engine.unpin(seal.pin)

    # ------------------------------------------------------------------ steps

    def plan(self) -> None:
        self.do_plan()

    def do_plan(self) -> bool:
        plan = self.engine.plan(self.now)
        if plan is None:
            return False
        assert plan.rows
        assert plan.tokens == sum(row.count for row in plan.rows)
        self.step.submit(plan)
        return True

    def complete(self) -> None:
        self.do_complete()

    def do_complete(self) -> None:
        for event in self.engine.complete(self.step.perform(), self.now):
            self.take(event)

    def take(self, event: EngineEvent) -> None:
        run = self.runs.get(event.key)
        assert run is not None, f"an event of a sequence that is over: {event}"
        match event:
            case TokensMade(new=new):
                self.take_tokens(run, new)
            case BlocksFilled(blocks=blocks, complete=complete):
                self.take_filled(run, blocks, complete=complete)
            case Preempted():
                assert not run.sealed_blocks or self.engine.phase(event.key) is not Phase.HELD

    def take_tokens(self, run: Run, new: NewTokens) -> None:
        job = run.job
        assert new.first == len(run.tokens), "a gap, or a token twice"
        wants = job.sampling.prompt_logprobs is not None and job.key.choice == 0
        if wants and new.first == 0 and new.tokens:
            assert new.prompt_logprobs == tuple(logprob_of(position) for position in range(1, len(job.prompt)))
        else:
            assert new.prompt_logprobs is None
        if job.sampling.logprobs is not None:
            assert new.logprobs == tuple(logprob_of(len(job.prompt) + new.first + i) for i in range(len(new.tokens)))
        run.tokens.extend(new.tokens)
        assert run.tokens == run.expected[: len(run.tokens)], "another token than alone"
        if new.ending is not None:
            assert run.tokens == run.expected
            assert new.ending == run.expected_ending
            assert not self.engine.holds(job.key)
            del self.runs[job.key]

    def take_filled(self, run: Run, blocks: tuple[FilledBlock, ...], *, complete: bool) -> None:
        job = run.job
        assert [block.index for block in blocks] == list(range(run.sealed_blocks, run.sealed_blocks + len(blocks)))
        run.sealed_blocks += len(blocks)
        positions = len(job.prompt) + len(job.given)
        assert complete == (run.sealed_blocks * BLOCK >= positions and len(run.tokens) > len(job.given))
        values = chain([*job.prompt, *job.given])
        for block in blocks:
            assert block.valid == min(BLOCK, positions - block.index * BLOCK)
            table = (block.block,) * (block.index + 1)
            for position in range(block.index * BLOCK, block.index * BLOCK + block.valid):
                assert self.kv.read(table, position) == values[position]
        self.seals.append(Seal(self.engine.pin(job.key), blocks))

    # ------------------------------------------------------------------ laws

    def sound(self) -> None:
        self.engine.check_invariants()
        assert {key for key in self.runs if self.engine.holds(key)} == set(self.runs)

    def finish(self) -> None:
        """Whatever was left undone: once it is done, everything ends and every block is free or cached."""
        while self.abandoned:
            self.reclaim()
        for run in self.landings():
            self.do_activate(run, good_blocks=run.sealed_blocks)
        for _ in range(STEPS_TO_THE_END):
            while self.seals:
                self.do_seal(self.seals.pop())
            for key in [key for key in self.runs if self.engine.phase(key) is Phase.HELD]:
                self.engine.keep(key)
            if self.step.busy:
                self.do_complete()
            elif not self.do_plan():
                break
            self.sound()
        assert not self.runs, "a sequence starves"
        while self.seals:
            self.do_seal(self.seals.pop())
        self.sound()
        assert self.engine.idle
        assert self.pool.held == 0
        assert self.pool.free + self.pool.cached == self.pool.total
