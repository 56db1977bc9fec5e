"""What a simulated request costs: `python -m tests.benchmarks.simulation_speed [REQUESTS]` prints CPU seconds on one core.

OPT-13B's step times, lognormal prompts and outputs of mean 755 and 200, feasible first and least seconds; a rate near the knee.
"""

import sys
import time
from random import Random

from common.simulation.goodput.deployment import Deployment, Policies
from common.simulation.goodput.distserve_preset import KV_TOKENS, opt_13b
from common.simulation.goodput.goodput_report import report_of
from common.simulation.goodput.goodput_simulator import GoodputSimulator
from common.simulation.goodput.workloads import Lengths, RequestClass, Workload
from common.values.objectives import Objectives

SHAPES = ((1, 1, 0, 4.0, False), (4, 4, 0, 18.0, False), (4, 4, 0, 18.0, True), (0, 0, 8, 10.0, False))


def main(requests: int) -> None:
    objectives = Objectives(ttft_s=0.25, tpot_s=0.1)
    prompt, output = Lengths(mean=755.0, sigma=1.0, most=2000), Lengths(mean=200.0, sigma=0.9, most=4096)
    workload = Workload(classes=(RequestClass(name="", prompt=prompt, output=output, objectives=objectives),))
    for prefill, decode, both, rate, free in SHAPES:
        deployment = Deployment(
            prefill=prefill, decode=decode, both=both, step_time=opt_13b(), kv_tokens=KV_TOKENS, policies=Policies(free=free)
        )
        arrivals = workload.draw(requests, rate, Random(1))
        started = time.process_time()
        flights = GoodputSimulator(deployment, workload.objectives, Random(0)).run(arrivals)
        seconds = time.process_time() - started
        good = 100 * report_of(flights).total.attained
        each = 1e6 * seconds / requests
        print(f"{deployment.name:14} {requests:>9,} requests {seconds:7.2f} s CPU, {each:5.1f} µs each; {good:.1f} % good", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
