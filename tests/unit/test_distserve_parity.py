"""DistServe's own simulator, request by request.

The fixture holds what LLMServe/DistServe's simulator (Apache-2.0, commit 82831f1, run unchanged) gave for 300 requests: OPT-13B, one
prefill and one decode worker, Poisson 3/s, lognormal lengths of mean 755.5 and 200.3.
"""

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from common.simulation.goodput.distserve_preset import distserve_deployment
from common.simulation.goodput.flight import Arrival
from common.simulation.goodput.goodput_report import report_of
from common.simulation.goodput.goodput_simulator import GoodputSimulator
from common.values.objectives import Objectives

ROWS = [json.loads(line) for line in (Path(__file__).parents[1] / "fixtures/distserve/opt13b_300.jsonl").read_text().splitlines()]
OBJECTIVES = {"": Objectives(ttft_s=0.25, tpot_s=0.1)}


@pytest.mark.parametrize("step_by_step", [False, True])
def test_every_request_has_its_times(step_by_step: bool) -> None:
    arrivals = [
        Arrival(arrived_s=row["arrived_s"], prompt_tokens=row["prompt_tokens"], output_tokens=row["output_tokens"]) for row in ROWS
    ]
    deployment = replace(distserve_deployment(), step_by_step=step_by_step)
    flights = GoodputSimulator(deployment, OBJECTIVES, Random(0)).run(arrivals)
    for flight, row in zip(flights, ROWS, strict=True):
        speed = flight.speed(first_token_counts=False)
        assert speed is not None
        assert 1000.0 * speed.ttft_s == pytest.approx(row["ttft_ms"], abs=1e-6)
        assert 1000.0 * speed.tpot_s == pytest.approx(row["tpot_ms"], abs=1e-6)
    good = sum(row["ttft_ms"] <= 250.0 and row["tpot_ms"] <= 100.0 for row in ROWS)
    assert report_of(flights, first_token_counts=False).total.attained == good / len(ROWS)
