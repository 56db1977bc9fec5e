"""A plan: which roles a number of workers should have for a demand, by how much, and why."""

from collections.abc import Callable
from dataclasses import dataclass

from common.policy.closed_form import Capacity, ClosedForm, WorkerLimits
from common.simulation.goodput.deployment import Deployment
from common.simulation.goodput.goodput_knee import WANTED
from common.simulation.planning.candidate import Candidate
from common.simulation.planning.demand import Demand, expected_requests
from common.simulation.planning.goodput_curve import GoodputCurve, draw_curve
from common.simulation.planning.split_search import SplitSearch
from common.simulation.planning.trial import Trial, try_out

SAMPLE = 400
"""Requests that stand for the demand in the closed form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanQuestion:
    """`like`: step times, limits and policies of the workers. `requests` of a simulation; `seeds` of the curve,
    the search's own among them."""

    workers: int
    like: Deployment
    wanted: float = WANTED
    every_class: bool = False
    requests: int = 1500
    seeds: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A candidate that was looked at closely. `rate` zero: less than is worth telling. `beyond`: what came out at a rate just
    above, whose misses say what binds; `good_tokens_per_s` at its goodput."""

    candidate: Candidate
    rate: float
    good_tokens_per_s: float
    expected: Capacity
    beyond: Trial | None

    @property
    def binds(self) -> str:
        """The phase whose objective is missed more."""
        if self.beyond is None or self.beyond.late == self.beyond.slow:
            return "both phases"
        return "prefill (TTFT)" if self.beyond.late > self.beyond.slow else "decode (TPOT)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`others` by goodput, the runner-up first. `simulations` were run in all, `seeds` for the curve."""

    workers: int
    wanted: float
    best: Option
    others: tuple[Option, ...]
    curve: GoodputCurve
    simulations: int
    seeds: int

    @property
    def runner_up(self) -> Option | None:
        return self.others[0] if self.others and self.others[0].rate > 0.0 else None

    def cost_per_million(self, option: Option, price_per_hour: float) -> float | None:
        """Of output tokens of good requests, at a price of one worker; None where there are none."""
        if option.good_tokens_per_s <= 0.0:
            return None
        return self.workers * price_per_hour / 3600.0 / option.good_tokens_per_s * 1e6


def make_plan(question: PlanQuestion, demand: Demand, *, told: Callable[[str], None] = lambda _: None) -> Plan:
    """`told` hears of progress."""
    like = question.like
    limits = WorkerLimits(
        kv_tokens=like.kv_tokens,
        max_sequences=like.max_sequences,
        batch_tokens=like.batch.max_tokens,
        step_tokens=like.step_tokens,
    )
    form = ClosedForm(like.step_time, limits, expected_requests(demand, SAMPLE, 0))
    ran = 0

    def simulated(candidate: Candidate, rate: float, seed: int) -> Trial:
        nonlocal ran
        ran += 1
        told(f"{ran}: {candidate.name} at {rate:.4g}/s")
        arrivals = demand.draw(question.requests, rate, seed)
        return try_out(candidate.deployed(like), arrivals, demand.objectives, rate=rate, seed=seed)

    def searched(candidate: Candidate, rate: float) -> Trial:
        return simulated(candidate, rate, 0)

    search = SplitSearch(question.workers, form, searched, wanted=question.wanted, every_class=question.every_class)
    best = search.best()
    others = search.others(best)
    goodput = search.knees[best].rate
    if goodput <= 0.0:
        raise ValueError("no rate is served well enough by any deployment: the objectives are out of these workers' reach")

    def at_seed(rate: float, seed: int) -> Trial:
        known = search.trials[best].get(rate) if seed == 0 else None
        return known or simulated(best, rate, seed)

    curve = draw_curve(at_seed, goodput, range(question.seeds), wanted=question.wanted)
    return Plan(
        workers=question.workers,
        wanted=question.wanted,
        best=_option(search, form, best),
        others=tuple(_option(search, form, each) for each in others),
        curve=curve,
        simulations=ran,
        seeds=question.seeds,
    )


def _option(search: SplitSearch, form: ClosedForm, candidate: Candidate) -> Option:
    knee = search.knees[candidate]
    at_knee = search.trials[candidate].get(knee.rate)
    if candidate.kind == "colocated":
        expected = form.colocated(candidate.prefill)
    else:
        expected = form.split(candidate.prefill, candidate.decode)
    return Option(
        candidate=candidate,
        rate=knee.rate,
        good_tokens_per_s=at_knee.good_tokens_per_s if at_knee is not None else 0.0,
        expected=expected,
        beyond=search.trial_above(candidate),
    )
