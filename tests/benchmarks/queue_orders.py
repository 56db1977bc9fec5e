"""What the order of waiting prompts is worth: `python -m tests.benchmarks.queue_orders [STEP_TIME_FILE]` prints goodputs.

One prefill worker, decode workers enough, the mix of W1 256+64, W2 1024+64 and W3 64+128 tokens at 50, 20 and 30 %; objectives are 5
times the unloaded TTFT of each class and 3 times the unloaded TPOT. Without a file (of `segue calibrate`, or coefficients), step times
are about those of a 135M model on two small cores. FCFS is measured by all requests together, which is kinder to it.
"""

import sys
from pathlib import Path
from random import Random
from typing import get_args

from common.policy.prefill_queue import BatchLimits, PrefillOrder
from common.policy.step_time import DecodeLine, DecodeTime, PrefillTime, StepTime
from common.simulation.goodput.deployment import Deployment, Policies
from common.simulation.goodput.goodput_knee import Knee, find_knee
from common.simulation.goodput.workloads import Lengths, RequestClass, Workload
from common.simulation.planning.trial import Trial, try_out
from common.values.objectives import Objectives
from tools.bench_engine_columns import markdown_table
from tools.simulate_step_time import read_step_time

SMALL_CPU = StepTime(
    prefill=PrefillTime(base_s=0.02, per_token_s=6.2e-4, per_pair_s=2.2e-7),
    decode=DecodeTime(line=DecodeLine(base_s=0.0255, per_kv_token_s=1e-6, per_sequence_s=9e-4)),
)
MIX = {"W1": (256, 64, 50), "W2": (1024, 64, 20), "W3": (64, 128, 30)}
CHUNK_TOKENS = 256
DECODE_WORKERS = 4
REQUESTS = 2000
SEEDS = (1, 2)


def main(step_time: StepTime) -> None:
    workload = the_mix(step_time)
    fcfs = knee_of("fcfs", step_time, workload, every_class=False).rate
    rows = []
    for order in get_args(PrefillOrder):
        all_together = knee_of(order, step_time, workload, every_class=False).rate
        each_class = knee_of(order, step_time, workload, every_class=True).rate
        there = trials(order, step_time, workload, 1.5 * fcfs)
        rows.append(
            (
                order,
                f"{all_together:.3g}",
                f"{each_class:.3g}",
                f"{each_class / fcfs:.2f}",
                f"{100 * sum(t.attained for t in there) / len(there):.1f}",
                f"{100 * min(t.least_class for t in there):.1f}",
            )
        )
    header = ("order", "goodput/s", "with every class at 90 %", "of FCFS's", f"good % at {1.5 * fcfs:.3g}/s", "least class there %")
    print(markdown_table(header, rows))


def the_mix(step_time: StepTime) -> Workload:
    classes = []
    for name, (prompt, output, share) in MIX.items():
        tpot_s = 3.0 * step_time.decode.seconds(1, prompt + 0.5 * output)
        objectives = Objectives(ttft_s=5.0 * step_time.prefill.chunked_s(prompt, 0, CHUNK_TOKENS), tpot_s=tpot_s)
        lengths = (Lengths(mean=prompt), Lengths(mean=output))
        classes.append(RequestClass(name=name, prompt=lengths[0], output=lengths[1], objectives=objectives, share=share))
    return Workload(classes=tuple(classes))


def knee_of(order: PrefillOrder, step_time: StepTime, workload: Workload, *, every_class: bool) -> Knee:
    """Over all seeds; with `every_class`, of the class and seed that has least."""

    def attained(rate: float) -> float:
        found = trials(order, step_time, workload, rate)
        return min(t.least_class for t in found) if every_class else sum(t.attained for t in found) / len(found)

    return find_knee(attained, start=3.0)


def trials(order: PrefillOrder, step_time: StepTime, workload: Workload, rate: float) -> list[Trial]:
    deployment = Deployment(
        prefill=1,
        decode=DECODE_WORKERS,
        step_time=step_time,
        batch=BatchLimits(max_tokens=CHUNK_TOKENS),
        policies=Policies(order=order, chunk_tokens=CHUNK_TOKENS),
    )
    return [
        try_out(deployment, workload.draw(REQUESTS, rate, Random(seed)), workload.objectives, rate=rate, seed=seed) for seed in SEEDS
    ]


if __name__ == "__main__":
    main(read_step_time(Path(sys.argv[1])) if len(sys.argv) > 1 else SMALL_CPU)
