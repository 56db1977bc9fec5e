"""The known workloads planned, beside exhaustive search: how much of the best goodput the planner's choice has, and what it took."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from common.simulation.goodput.goodput_knee import PRECISION, find_knee
from common.simulation.planning.candidate import Candidate, candidates
from common.simulation.planning.demand import DrawnDemand
from common.simulation.planning.plan import Plan, PlanQuestion, make_plan
from common.simulation.planning.trial import try_out
from common.values.errors import SettingsError
from tools.bench_engine_columns import markdown_table
from tools.plan_workloads import mixed, read_workloads

RULE = {
    "long inputs, TTFT first": (2.0, 4.0),
    "short inputs, TPOT first": (0.5, 1.0),
}
"""The rule of thumb for prefill to decode workers."""
LONG_INPUT, SHORT_INPUT = 10.0, 2.0
"""Input to output tokens from which on, and up to which, the rule is about a workload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """`best` and `best_split` of all candidates and of the strict splits, with their goodputs on the search's own requests; None where
    no exhaustive search was made. `seconds` of CPU for the plan."""

    workload: str
    plan: Plan
    seconds: float
    best: tuple[Candidate, float] | None
    best_split: tuple[Candidate, float] | None
    rule: str | None

    @property
    def percent_of_best(self) -> float | None:
        return None if self.best is None else 100 * self.plan.best.rate / self.best[1]


def plan_row(question: PlanQuestion, name: str, *, exhaustive: bool) -> Row:
    demand = DrawnDemand(mixed([name]), question.like.kv_tokens)
    started = time.process_time()
    plan = make_plan(question, demand)
    seconds = time.process_time() - started
    (entry,) = [entry for entry in read_workloads() if entry.name == name]
    ratio = entry.input_tokens.mean / entry.output_tokens.mean
    rule = next(iter(RULE)) if ratio >= LONG_INPUT else list(RULE)[1] if ratio <= SHORT_INPUT else None
    best = best_split = None
    if exhaustive:
        every = candidates(question.workers)
        best = best_of(question, demand, every, (plan.best.candidate, plan.best.rate))
        strict = [option for option in (plan.best, *plan.others) if option.candidate.kind == "split" and option.rate > 0.0]
        known = (strict[0].candidate, strict[0].rate) if strict else None
        best_split = best_of(question, demand, [each for each in every if each.kind == "split"], known)
    return Row(workload=name, plan=plan, seconds=seconds, best=best, best_split=best_split, rule=rule)


def best_of(
    question: PlanQuestion, demand: DrawnDemand, among: Sequence[Candidate], best: tuple[Candidate, float] | None
) -> tuple[Candidate, float]:
    """Every one is simulated at the best rate so far, on the search's own requests; who serves it well is searched for its own."""

    def attained(candidate: Candidate, rate: float) -> float:
        arrivals = demand.draw(question.requests, rate, 0)
        return try_out(candidate.deployed(question.like), arrivals, demand.objectives, rate=rate, seed=0).attained

    for candidate in sorted(among, key=lambda each: abs(each.prefill - each.decode)):
        if best is not None and candidate == best[0]:
            continue
        if best is not None and attained(candidate, best[1] * (1.0 + 0.25 * PRECISION)) < question.wanted:
            continue
        start = best[1] if best is not None else 1.0
        rate = find_knee(partial(attained, candidate), wanted=question.wanted, start=start).rate
        if best is None or rate > best[1]:
            best = (candidate, rate)
    if best is None:
        raise ValueError("there is nothing to choose from")
    return best


def print_table(question: PlanQuestion, names: Sequence[str], *, exhaustive: bool, json_path: str | None) -> int:
    """Status 1 where a plan is below 97 % of the best."""
    known = [entry.name for entry in read_workloads()]
    if unknown := set(names) - set(known):
        raise SettingsError(f"--workload: {', '.join(sorted(unknown))} is not among {', '.join(known)}")
    rows = []
    for name in names or known:
        rows.append(plan_row(question, name, exhaustive=exhaustive))
        print(f"{name}: {rows[-1].seconds:.1f} s", file=sys.stderr, flush=True)
    header = ("workload", "planned", "best of all", "planned %", "best strict", "CPU s", "rule of thumb")
    print(markdown_table(header, [_cells(row) for row in rows]))
    if json_path is not None:
        Path(json_path).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 1 if any(row.percent_of_best is not None and row.percent_of_best < 97.0 for row in rows) else 0


def rule_holds(row: Row) -> bool | None:
    """Of the best strict split; None where the rule is not about the workload, or no exhaustive search was made."""
    if row.rule is None or row.best_split is None:
        return None
    split = row.best_split[0]
    low, high = RULE[row.rule]
    return low <= split.prefill / split.decode <= high


def _cells(row: Row) -> tuple[str, ...]:
    holds = rule_holds(row)
    percent = row.percent_of_best
    return (
        row.workload,
        _named((row.plan.best.candidate, row.plan.best.rate)),
        _named(row.best),
        "-" if percent is None else f"{percent:.1f}",
        _named(row.best_split),
        f"{row.seconds:.1f}",
        "-" if holds is None or row.rule is None else f"{row.rule}: {'holds' if holds else 'does not hold'}",
    )


def _named(found: tuple[Candidate, float] | None) -> str:
    return "-" if found is None else f"{found[0].name}: {found[1]:.4g}/s"
