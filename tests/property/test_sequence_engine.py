"""Laws of the sequence engine under any order of jobs, hand-offs, imports, releases and steps, with small pools."""

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from common.mesh.engine_values import Preempted, SequenceJob
from common.mesh.sequence_engine import SequenceEngine
from common.simulation.shadow_kv import ShadowKv, ShadowStep
from common.values.ids import RequestId, SequenceKey
from common.values.sampling import SamplingParameters
from tests.sequence_driver import BLOCK, Driver, make_engine


@settings(max_examples=250, deadline=None)
@given(seed=st.integers(0, 2**32), events=st.integers(1, 250))
def test_every_sequence_makes_what_it_makes_alone_and_leaves_nothing_behind(seed: int, events: int) -> None:
    driver = Driver(Random(seed))
    for _ in range(events):
        driver.do_something()
    driver.finish()


def job_of(name: str, prompt: tuple[int, ...], *, max_tokens: int = 4, salt: bytes = b"", choice: int = 0) -> SequenceJob:
    sampling = SamplingParameters(max_tokens=max_tokens, seed=1, ignore_eos=True)
    return SequenceJob(key=SequenceKey(RequestId(name), choice), prompt=prompt, sampling=sampling, salt=salt)


def run_to_the_end(engine: SequenceEngine, step: ShadowStep) -> None:
    while (plan := engine.plan(0.0)) is not None:
        step.submit(plan)
        engine.complete(step.perform(), 0.0)


def test_a_prompt_seen_before_is_computed_once_and_never_across_tenants() -> None:
    kv = ShadowKv(32, BLOCK)
    engine, _ = make_engine(kv)
    step = ShadowStep(kv)
    prompt = tuple(range(16))
    engine.submit(job_of("a", prompt), 0.0)
    run_to_the_end(engine, step)
    engine.submit(job_of("b", prompt, salt=b"another tenant"), 0.0)
    run_to_the_end(engine, step)
    assert engine.load().prefix_hit_tokens == 0
    engine.submit(job_of("c", prompt), 0.0)
    run_to_the_end(engine, step)
    assert engine.load().prefix_hit_tokens == 12, "all full blocks but the one with the last token, whose logits are needed"


def test_a_follower_finds_its_leaders_prompt() -> None:
    kv = ShadowKv(32, BLOCK)
    engine, _ = make_engine(kv, max_tokens=5)
    step = ShadowStep(kv)
    prompt = tuple(range(16))
    leader = job_of("a", prompt)
    engine.submit(leader, 0.0)
    follower = job_of("a", prompt, choice=1)
    engine.submit(SequenceJob(key=follower.key, prompt=prompt, sampling=follower.sampling, after=leader.key), 0.0)
    run_to_the_end(engine, step)
    assert engine.load().prefix_hit_tokens == 12


def test_the_oldest_sequence_never_gives_up_its_blocks() -> None:
    kv = ShadowKv(6, BLOCK)
    engine, _ = make_engine(kv)
    for name in "abc":
        engine.submit(job_of(name, (len(name), ord(name) % 7, 1, 2, 3), max_tokens=15), 0.0)
    step = ShadowStep(kv)
    preempted: list[str] = []
    while (plan := engine.plan(0.0)) is not None:
        step.submit(plan)
        preempted += [event.key.request_id for event in engine.complete(step.perform(), 0.0) if isinstance(event, Preempted)]
    assert preempted
    assert "a" not in preempted
    assert engine.idle


def test_older_prompts_get_the_budget_first() -> None:
    kv = ShadowKv(32, BLOCK)
    engine, _ = make_engine(kv, max_tokens=3)
    step = ShadowStep(kv)
    for number in range(3):
        engine.submit(job_of(f"r{number}", (number, 1, 2, 3, 4, 5, 6), max_tokens=1), 0.0)
    ended: list[str] = []
    while (plan := engine.plan(0.0)) is not None:
        step.submit(plan)
        ended += [event.key.request_id for event in engine.complete(step.perform(), 0.0)]
    assert ended == ["r0", "r1", "r2"]
