"""The closed form of goodput: more workers serve more, tighter objectives less, and its best split is near the simulated one."""

from random import Random

import pytest

from common.policy.closed_form import ClosedForm, ExpectedRequest, WorkerLimits
from common.simulation.goodput.distserve_preset import KV_TOKENS, opt_13b
from common.simulation.goodput.workloads import Lengths
from common.values.objectives import Objectives

LIMITS = WorkerLimits(kv_tokens=KV_TOKENS, max_sequences=512, batch_tokens=2048, step_tokens=256)


def form(
    prompt: float, output: float, *, ttft_s: float = 1.0, tpot_s: float = 0.1, limits: WorkerLimits = LIMITS, sigma: float = 0.6
) -> ClosedForm:
    rng = Random(1)
    prompts, outputs = Lengths(mean=prompt, sigma=sigma, most=8000), Lengths(mean=output, sigma=sigma, most=4096)
    objectives = Objectives(ttft_s=ttft_s, tpot_s=tpot_s)
    sample = [
        ExpectedRequest(prompt_tokens=prompts.draw(rng), output_tokens=outputs.draw(rng), objectives=objectives) for _ in range(300)
    ]
    return ClosedForm(opt_13b(), limits, sample)


@pytest.mark.parametrize("prompt", [100, 755, 4000])
def test_more_workers_serve_more_and_two_more_than_twice_one(prompt: float) -> None:
    demand = form(prompt, 200)
    rates = [demand.prefill(workers).rate for workers in range(1, 9)]
    assert rates == sorted(rates)
    assert rates[1] >= 2.0 * rates[0] * 0.999
    assert demand.decode(4).rate == pytest.approx(4.0 * demand.decode(1).rate)
    assert demand.colocated(8).rate >= demand.colocated(4).rate


def test_a_split_serves_what_its_lesser_side_serves() -> None:
    demand = form(755, 200)
    for prefill in range(1, 8):
        split = demand.split(prefill, 8 - prefill)
        assert split.rate == min(demand.prefill(prefill).rate, demand.decode(8 - prefill).rate)
    assert demand.split(1, 7).limit == "prefill"
    assert demand.split(7, 1).limit != "prefill"


def test_what_bounds_the_streams_is_named() -> None:
    assert form(755, 200, tpot_s=0.025).decode(1).limit == "step time"
    assert form(4000, 200, tpot_s=10.0).decode(1).limit == "KV"
    few = WorkerLimits(kv_tokens=KV_TOKENS, max_sequences=2, batch_tokens=2048, step_tokens=256)
    assert form(100, 200, limits=few).decode(1).limit == "sequences"


def test_tighter_objectives_leave_less() -> None:
    assert form(755, 200, ttft_s=0.25).prefill(2).rate < form(755, 200, ttft_s=1.0).prefill(2).rate
    assert form(755, 200, tpot_s=0.03).decode(2).rate < form(755, 200, tpot_s=0.1).decode(2).rate
    assert form(755, 200, ttft_s=0.01).prefill(8).rate == pytest.approx(0.0, abs=1e-3)
    assert form(755, 200, tpot_s=0.01).decode(8).rate == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize(
    ("prompt", "output", "ttft_s", "tpot_s", "sigma", "simulated"),
    [(4000, 100, 1.5, 0.1, 0.4, 5), (1000, 200, 1.0, 0.1, 0.9, 3), (200, 1000, 0.5, 0.03, 0.6, 1), (100, 100, 0.3, 0.03, 0.5, 2)],
)
def test_the_best_split_of_eight_is_at_most_one_worker_off(
    prompt: float, output: float, ttft_s: float, tpot_s: float, sigma: float, simulated: int
) -> None:
    demand = form(prompt, output, ttft_s=ttft_s, tpot_s=tpot_s, sigma=sigma)
    best = max(range(1, 8), key=lambda prefill: demand.split(prefill, 8 - prefill).rate)
    assert abs(best - simulated) <= 1


def test_a_demand_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        ClosedForm(opt_13b(), LIMITS, [])
