"""The step-time model: what it predicts, what a fit recovers, and what a refit follows or refuses."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.policy.least_squares import SquareSums, non_negative_solution
from common.policy.step_time import Chunk, DecodeLine, DecodeTime, PrefillTime, StepTime
from common.policy.step_time_coefficients import coefficients_of, step_time_of
from common.policy.step_time_fit import DecodeSample, PrefillSample, decode_error, fit_decode, fit_prefill, prefill_error
from common.policy.step_time_refit import RefitLimits, StepTimeRefit

PREFILL = PrefillTime(base_s=0.02, per_token_s=1e-4, per_pair_s=1e-8)
LINE = DecodeLine(base_s=0.02, per_kv_token_s=6e-7, per_sequence_s=4e-5)
BEYOND = DecodeLine(base_s=0.007, per_kv_token_s=6e-7, per_sequence_s=3e-4)
KNEE = DecodeTime(line=LINE, knee=64, beyond=BEYOND)
TIME = StepTime(prefill=PREFILL, decode=DecodeTime(line=LINE))


def prefill_samples(time: PrefillTime, noise: float = 0.0) -> list[PrefillSample]:
    rng = random.Random(1)
    shapes = [(tokens, past) for tokens in (8, 32, 128, 512, 2048) for past in (0, 512, 4096)]
    return [PrefillSample(tokens=t, past=p, seconds=time.seconds(t, p) * (1 + noise * rng.uniform(-1, 1))) for t, p in shapes]


def decode_samples(time: DecodeTime) -> list[DecodeSample]:
    shapes = [(n, n * context) for n in (1, 4, 16, 32, 64, 96, 128, 256) for context in (64, 512, 2048)]
    return [DecodeSample(sequences=n, kv_tokens=kv, seconds=time.seconds(n, kv)) for n, kv in shapes]


def test_chunks_cost_what_the_whole_costs_and_a_base_each() -> None:
    halves = PREFILL.seconds(300) + PREFILL.seconds(212, past=300)
    assert halves == pytest.approx(PREFILL.seconds(512) + PREFILL.base_s)
    assert PREFILL.chunked_s(512, 0, 300) == pytest.approx(halves)
    assert PREFILL.batch_s([Chunk(tokens=300), Chunk(tokens=212, past=300)]) == pytest.approx(PREFILL.seconds(512))


def test_a_mixed_step_reads_the_weights_once() -> None:
    assert TIME.mixed_s([], 4, 100) == TIME.decode.seconds(4, 100), "its base is the larger one"
    assert TIME.mixed_s([Chunk(tokens=64)], 0, 0) == pytest.approx(PREFILL.seconds(64))
    mixed = TIME.mixed_s([Chunk(tokens=64)], 4, 100)
    assert TIME.decode.seconds(4, 100) < mixed < TIME.decode.seconds(4, 100) + PREFILL.seconds(64)


def test_at_saturation_the_base_is_a_tenth() -> None:
    flat = PrefillTime(base_s=0.02, per_token_s=1e-4)
    assert flat.base_s / flat.seconds(flat.saturation_tokens) == pytest.approx(0.1, rel=1e-3)


def test_the_knee_decides_by_sequences() -> None:
    assert KNEE.seconds(63, 0) == LINE.seconds(63, 0)
    assert KNEE.seconds(64, 0) == BEYOND.seconds(64, 0)
    with pytest.raises(ValueError, match="knee"):
        DecodeTime(line=LINE, knee=3)


@given(
    st.lists(st.tuples(*[st.floats(0.01, 10.0)] * 4), min_size=4, max_size=12),
    st.tuples(*[st.floats(0.0, 5.0)] * 3),
)
def test_no_non_negative_neighbour_is_better(samples: list[tuple[float, ...]], step: tuple[float, ...]) -> None:
    sums = SquareSums(3)
    for *row, target in samples:
        sums.add(row, target)
    solution = non_negative_solution(sums)
    assert min(solution) >= 0.0
    tolerance = 1e-7 * (1.0 + sums.square)
    assert sums.residual(solution) <= sums.residual(step) + tolerance
    for share in (0.01, 0.5):
        between = [a + share * (b - a) for a, b in zip(solution, step, strict=True)]
        assert sums.residual(solution) <= sums.residual(between) + tolerance


def test_a_fit_recovers_the_model_and_leaves_no_error() -> None:
    samples = prefill_samples(PREFILL)
    fitted = fit_prefill(samples)
    assert fitted.per_token_s == pytest.approx(PREFILL.per_token_s, rel=1e-6)
    assert fitted.per_pair_s == pytest.approx(PREFILL.per_pair_s, rel=1e-6)
    assert prefill_error(samples).worst < 1e-6


def test_the_knee_is_found_where_it_is_and_not_where_none_is() -> None:
    fitted = fit_decode(decode_samples(KNEE))
    assert fitted.knee == 64
    assert fitted.beyond is not None
    assert fitted.beyond.per_sequence_s == pytest.approx(BEYOND.per_sequence_s, rel=1e-5)
    assert decode_error(decode_samples(KNEE), fitted).worst < 1e-6
    assert fit_decode(decode_samples(DecodeTime(line=LINE))).knee is None


def test_the_error_of_what_was_left_out_is_about_the_noise() -> None:
    error = prefill_error(prefill_samples(PREFILL, noise=0.05))
    assert 0.005 < error.mean < 0.08
    assert error.samples == 15


def test_an_unmeasured_column_is_zero_not_garbage() -> None:
    same = [PrefillSample(tokens=64, past=0, seconds=0.1)] * 5
    assert fit_prefill(same).seconds(64) == pytest.approx(0.1)


def slower(factor: float, tokens: int, past: int) -> PrefillSample:
    return PrefillSample(tokens=tokens, past=past, seconds=factor * PREFILL.seconds(tokens, past))


def test_a_refit_follows_a_machine_that_slows_down() -> None:
    refit = StepTimeRefit(TIME, RefitLimits(kept=0.99))
    rng = random.Random(2)
    for _ in range(1500):
        refit.observe_prefill(slower(1.6, rng.randint(16, 1024), rng.randint(0, 512)))
    assert refit.current().prefill.seconds(512) == pytest.approx(1.6 * PREFILL.seconds(512), rel=0.08)
    assert refit.current().decode == pytest.approx(TIME.decode) or refit.current().decode.seconds(8, 900) == pytest.approx(
        TIME.decode.seconds(8, 900)
    )


def test_steps_that_are_all_alike_do_not_unlearn_the_line() -> None:
    refit = StepTimeRefit(TIME)
    for _ in range(3000):
        refit.observe_prefill(slower(1.1, 256, 0))
    current = refit.current().prefill
    assert current.seconds(256) == pytest.approx(1.1 * PREFILL.seconds(256), rel=0.02)
    assert current.seconds(1024) == pytest.approx(PREFILL.seconds(1024), rel=0.25)


def test_warm_up_and_single_stalls_are_not_believed() -> None:
    refit = StepTimeRefit(TIME, RefitLimits(warm_up=5))
    for _ in range(5):
        refit.observe_prefill(slower(50.0, 256, 0))
    assert refit.current().prefill.seconds(256) == pytest.approx(PREFILL.seconds(256))
    for step in range(100):
        refit.observe_prefill(slower(30.0 if step % 10 == 0 else 1.0, 256, 0))
    assert refit.refused == 10
    assert refit.current().prefill.seconds(256) == pytest.approx(PREFILL.seconds(256))


def test_a_machine_that_became_three_times_slower_is_believed_in_the_end() -> None:
    refit = StepTimeRefit(TIME, RefitLimits(kept=0.98))
    for _ in range(600):
        refit.observe_prefill(slower(3.0, 256, 0))
    assert refit.refused > 0
    assert refit.current().prefill.seconds(256) == pytest.approx(3.0 * PREFILL.seconds(256), rel=0.1)


def test_both_sides_of_the_knee_learn_apart() -> None:
    refit = StepTimeRefit(StepTime(prefill=PREFILL, decode=KNEE), RefitLimits(kept=0.98))
    for _ in range(500):
        refit.observe_decode(DecodeSample(sequences=100, kv_tokens=50_000, seconds=1.5 * KNEE.seconds(100, 50_000)))
    current = refit.current().decode
    assert current.seconds(100, 50_000) == pytest.approx(1.5 * KNEE.seconds(100, 50_000), rel=0.1)
    assert current.seconds(8, 4000) == pytest.approx(KNEE.seconds(8, 4000))


@pytest.mark.parametrize("decode", [DecodeTime(line=LINE), KNEE])
def test_coefficients_carry_the_whole_model(decode: DecodeTime) -> None:
    time = StepTime(prefill=PREFILL, decode=decode)
    assert step_time_of(coefficients_of(time)) == time
