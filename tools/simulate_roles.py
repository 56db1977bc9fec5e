"""`segue simulate-roles`: roles that follow the load, against every static split and a threshold rule, in virtual time.

The load moves between long prompts with short answers (1500 in, 40 out) and short prompts with long answers (200 in, 400 out), on
workers as fast as OPT-13B's on an A100, with a TTFT objective of 1 s and a TPOT objective of 60 ms. The rates are `--load` times what
the best split carries at either end. Controller and rule begin with half of the workers in each role.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from common.policy.prefill_queue import BatchLimits
from common.policy.role_threshold import ThresholdRule
from common.simulation.goodput.deployment import Deployment, Policies, TransferTime
from common.simulation.goodput.distserve_preset import KV_TOKENS, opt_13b
from common.simulation.goodput.workloads import Lengths, RequestClass
from common.simulation.roles.role_comparison import Comparison, compare
from common.simulation.roles.scenarios import LoadEnds, scenarios
from common.values.objectives import Objectives
from tools.bench_engine_columns import markdown_table

OBJECTIVES = Objectives(ttft_s=1.0, tpot_s=0.06)
ENDS_OF_FOUR = LoadEnds(
    reading=RequestClass(
        name="reading",
        prompt=Lengths(mean=1500.0, sigma=0.5, least=16, most=4096),
        output=Lengths(mean=40.0, sigma=0.5, least=2, most=400),
        objectives=OBJECTIVES,
    ),
    writing=RequestClass(
        name="writing",
        prompt=Lengths(mean=200.0, sigma=0.5, least=16, most=2000),
        output=Lengths(mean=400.0, sigma=0.5, least=16, most=2000),
        objectives=OBJECTIVES,
    ),
    reading_rps=15.0,
    writing_rps=15.3,
)
"""The rates at which 3:1 and 1:3 still serve 90 % of the requests well."""
RULE = ThresholdRule(queue_high_s=0.5, queue_low_s=0.2, step_high_s=0.05, step_low_s=0.04)
HEADER = (
    "scenario",
    "requests",
    "static splits, good %",
    "best",
    "threshold rule",
    "changes",
    "controller",
    "changes",
    "closest s",
    "lead",
)


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.workers < 2 or options.load <= 0.0 or options.seconds < 1.0:
        print("segue simulate-roles: there are at least two workers, and a load", file=sys.stderr)
        return 2
    ends = ENDS_OF_FOUR.scaled(options.load * options.workers / 4.0)
    chosen = [each for each in scenarios(options.seconds) if not options.scenario or each.name in options.scenario]
    comparisons = []
    for scenario in chosen:
        for seed in range(options.seed, options.seed + options.seeds):
            comparisons.append(compare(scenario, ends, deployment(options.workers, free=options.free), RULE, seed=seed))
            print(f"{scenario.name}, seed {seed}: done", file=sys.stderr, flush=True)
    print(markdown_table(HEADER, [_row(each) for each in comparisons]))
    if options.json is not None:
        Path(options.json).write_text(json.dumps([_plain(each) for each in comparisons], indent=1) + "\n", "utf-8")
    return 0


def deployment(workers: int, *, free: bool) -> Deployment:
    return Deployment(
        prefill=workers // 2,
        decode=workers - workers // 2,
        step_time=opt_13b(),
        kv_tokens=KV_TOKENS,
        max_sequences=512,
        batch=BatchLimits(max_tokens=2048),
        transfer=TransferTime(base_s=0.002, per_token_s=2e-6),
        policies=Policies(free=free),
        changeable=True,
    )


def _row(comparison: Comparison) -> tuple[str, ...]:
    splits = " ".join(f"{p}:{d} {100 * share:.1f}" for (p, d), share in comparison.static.items())
    (prefill, decode), best = comparison.best_static
    rule, controller = comparison.threshold, comparison.controller
    return (
        comparison.scenario,
        str(comparison.requests),
        splits,
        f"{prefill}:{decode} {100 * best:.1f}",
        f"{100 * rule.report.total.attained:.1f}",
        str(len(rule.changes)),
        f"{100 * controller.report.total.attained:.1f}",
        str(len(controller.changes)),
        "-" if controller.closest_s is None else f"{controller.closest_s:.0f}",
        f"{100 * comparison.lead:+.1f}",
    )


def _plain(comparison: Comparison) -> dict[str, object]:
    return {
        "scenario": comparison.scenario,
        "requests": comparison.requests,
        "static": {f"{p}:{d}": share for (p, d), share in comparison.static.items()},
        "threshold": asdict(comparison.threshold),
        "controller": asdict(comparison.controller),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="segue simulate-roles", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--scenario", action="append", choices=[each.name for each in scenarios(1.0)], help="which (default: all)")
    add("--workers", type=int, default=4, help="prefill and decode workers together (default 4)")
    add("--free", action="store_true", help="free placement: roles are preferences")
    add("--load", type=float, default=0.85, help="of what the best split carries (default 0.85)")
    add("--seconds", type=float, default=240.0, help="virtual length of a scenario (default 240)")
    add("--seed", type=int, default=0)
    add("--seeds", type=int, default=1, help="runs of each scenario (default 1)")
    add("--json", metavar="FILE", help="write all figures there")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
