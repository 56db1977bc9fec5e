"""Which prompts a worker computes next and how much of them: what the engine makes of the policies, on steps that take what a
step-time model says."""

from dataclasses import dataclass, field
from itertools import permutations

from hypothesis import given, settings
from hypothesis import strategies as st

from common.mesh.engine_values import Promise, SequenceJob, TokensMade
from common.mesh.sequence_engine import SequenceEngine
from common.policy.batching import StepLimits
from common.policy.block_pool import BlockPool
from common.policy.prefill_queue import PrefillOrder
from common.policy.step_time import Chunk, DecodeLine, DecodeTime, PrefillTime, StepTime
from common.protocol.messages import StageSeconds
from common.simulation.shadow_kv import ShadowKv, ShadowStep, reference
from common.values.ids import RequestId, SequenceKey
from common.values.kv_layout import Fingerprint, KvLayout
from common.values.sampling import SamplingParameters
from common.values.step import StepPlan

TIME = StepTime(
    prefill=PrefillTime(base_s=0.001, per_token_s=0.001),
    decode=DecodeTime(line=DecodeLine(base_s=0.01, per_kv_token_s=0.0, per_sequence_s=0.0)),
)
"""Saturated from 9 tokens on."""
LENGTH = 400


@dataclass
class Clock:
    """An engine whose steps take exactly what the model says."""

    order: PrefillOrder = "feasible_first"
    budget: int = 32
    now: float = 0.0
    plans: list[StepPlan] = field(default_factory=list)
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    stages: dict[str, StageSeconds] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layout = KvLayout(layers=1, kv_heads=1, head_dim=1, block_size=4)
        kv = ShadowKv(800, 4)
        self.step = ShadowStep(kv)
        self.engine = SequenceEngine(
            fingerprint=Fingerprint(weights="w", dtype="float32", layout=layout),
            pool=BlockPool(800, kv.generations),
            limits=StepLimits(max_tokens=self.budget, max_sequences=64),
            max_model_len=LENGTH,
            eos_token_ids=(),
            order=self.order,
        )
        self.engine.start_from(TIME)

    def submit(self, name: str, prompt: int, *, max_tokens: int = 1, promise: Promise | None = None) -> None:
        sampling = SamplingParameters(max_tokens=max_tokens, seed=1, ignore_eos=True)
        job = SequenceJob(
            key=SequenceKey(RequestId(name), 0), prompt=ids(name, prompt), sampling=sampling, promise=promise or Promise()
        )
        assert self.engine.submit(job, self.now) == "accepted"

    def one_step(self) -> bool:
        plan = self.engine.plan(self.now)
        if plan is None:
            return False
        self.plans.append(plan)
        chunks = [Chunk(tokens=row.count, past=row.start) for row in plan.rows if row.count > 1]
        self.now += TIME.mixed_s(chunks, len(plan.rows) - len(chunks), 0.0)
        self.step.submit(plan)
        for event in self.engine.complete(self.step.perform(), self.now):
            if isinstance(event, TokensMade):
                name = event.key.request_id
                self.first.setdefault(name, self.now)
                self.last[name] = self.now
                self.tokens.setdefault(name, []).extend(event.new.tokens)
                if event.stages is not None:
                    self.stages[name] = event.stages
        self.engine.check_invariants()
        return True

    def run(self) -> None:
        while self.one_step():
            pass
        assert self.engine.idle


def ids(name: str, length: int) -> tuple[int, ...]:
    """Prompts share no prefix."""
    return (ord(name[0]) % 7, ord(name[-1]) % 5, *(n % 7 for n in range(length - 2)))


def test_what_is_due_first_is_computed_first_and_the_hopeless_last() -> None:
    clock = Clock()
    for name, deadline in (("a", 10.0), ("b", 0.001), ("c", 0.3)):
        clock.submit(name, 60, promise=Promise(deadline=deadline))
    clock.run()
    assert sorted(clock.first, key=clock.first.__getitem__) == ["c", "a", "b"]


def test_an_urgent_prompt_goes_between_two_chunks_of_a_long_one() -> None:
    times = {}
    for order in ("feasible_first", "fcfs"):
        clock = Clock(order)  # type: ignore[arg-type]
        clock.submit("long", 320, promise=Promise(deadline=10.0))
        assert clock.one_step()
        clock.submit("urgent", 20, promise=Promise(deadline=clock.now + 0.05))
        clock.run()
        times[order] = clock.first["urgent"]
        assert set(clock.first) == {"long", "urgent"}
    assert times["feasible_first"] < 0.1 < times["fcfs"]


def test_a_long_prompt_that_is_late_keeps_a_share_of_the_steps() -> None:
    clock = Clock()
    clock.submit("long", 320, promise=Promise(deadline=0.0))
    assert clock.one_step()
    for number in range(300):
        clock.submit(f"urgent{number}", 20, promise=Promise(deadline=clock.now + 0.03))
        assert clock.one_step()
        if "long" in clock.first:
            break
    assert "long" in clock.first, "it starves"
    clock.run()


def test_a_step_of_several_prompts_is_no_longer_than_gains_throughput() -> None:
    clock = Clock(budget=256)
    for number in range(6):
        clock.submit(f"r{number}", 4)
    clock.run()
    assert max(plan.tokens for plan in clock.plans) <= TIME.prefill.saturation_tokens
    assert max(len(plan.rows) for plan in clock.plans) == 2


def test_chunks_beside_a_stream_leave_it_what_it_needs_to_keep_its_objective() -> None:
    """What the stream can lose decides; the same prompt, the same stream."""
    for tpot_s, first_chunk in ((1.0, 63), (0.0108, 1)):
        clock = Clock(budget=64)
        clock.submit("stream", 8, max_tokens=300, promise=Promise(tpot_s=tpot_s, expected_tokens=300))
        assert clock.one_step()
        clock.submit("prompt", 300)
        clock.run()
        assert next(row.count for plan in clock.plans for row in plan.rows if len(plan.rows) > 1 and row.start == 0) == first_chunk
        assert (clock.last["stream"] - clock.first["stream"]) / 299 <= tpot_s + 1e-9
        assert "prompt" in clock.first


def test_the_stages_of_a_sequence_add_up() -> None:
    clock = Clock()
    clock.submit("a", 64)
    clock.submit("b", 64)
    clock.run()
    for name, stages in clock.stages.items():
        assert stages.prefill_queue_s is not None
        assert stages.prefill_s is not None
        assert abs(stages.prefill_queue_s + stages.prefill_s - clock.first[name]) < 1e-9
    assert clock.stages["b"].prefill_queue_s == clock.first["a"]


prompts = st.lists(st.tuples(st.integers(2, 80), st.floats(0.0, 0.6), st.booleans(), st.integers(1, 6)), min_size=1, max_size=8)


@settings(max_examples=120, deadline=None)
@given(prompts=prompts, order=st.sampled_from(["feasible_first", "edf", "shortest_first", "fcfs"]), steps=st.integers(0, 3))
def test_the_order_never_changes_what_is_made_and_starves_nobody(
    prompts: list[tuple[int, float, bool, int]], order: PrefillOrder, steps: int
) -> None:
    clock = Clock(order)
    lengths = {}
    for number, (length, deadline, gives_way, max_tokens) in enumerate(prompts):
        name = f"{'abcdefgh'[number]}{number}"
        lengths[name] = (length, max_tokens)
        promise = Promise(deadline=clock.now + deadline, tpot_s=0.02, gives_way=gives_way, best_effort=gives_way)
        clock.submit(name, length, max_tokens=max_tokens, promise=promise)
        for _ in range(steps):
            clock.one_step()
    clock.run()
    for name, (length, max_tokens) in lengths.items():
        sampling = SamplingParameters(max_tokens=max_tokens, seed=1, ignore_eos=True)
        assert clock.tokens[name] == reference(ids(name, length), sampling, 0, LENGTH)[0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 40), st.floats(0.01, 0.4)), min_size=2, max_size=4))
def test_no_order_of_whole_prompts_has_more_of_them_on_time(prompts: list[tuple[int, float]]) -> None:
    """All there at once and every prompt a step of its own (longer than half a batch): feasible first is the best order."""
    wanted = {f"{'abcd'[n]}": (20 + length, deadline) for n, (length, deadline) in enumerate(prompts)}
    clock = Clock(budget=64)
    for name, (length, deadline) in wanted.items():
        clock.submit(name, length, promise=Promise(deadline=deadline))
    clock.run()
    on_time = sum(clock.first[name] <= deadline + 1e-9 for name, (_, deadline) in wanted.items())
    best = 0
    for order in permutations(wanted.values()):
        end, count = 0.0, 0
        for length, deadline in order:
            end += TIME.prefill.seconds(length)
            count += end <= deadline + 1e-9
        best = max(best, count)
    assert on_time >= best
