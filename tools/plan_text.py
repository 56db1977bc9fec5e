"""What `segue plan` prints: the answer first, then what it is compared with, how sure it is, and what it does not know."""

from collections.abc import Sequence

from common.simulation.planning.plan import Option, Plan
from tools.bench_engine_columns import markdown_table

NOT_MODELLED = (
    "faults, and what the mesh does about them",
    "the gateway, tokenising and the network's own delay",
    "preemption: a request reserves the KV of all its tokens when it starts",
    "roles that change while the demand does: the plan is for one demand that lasts",
    "workers of different speeds",
)
MEANS = {
    "split": "split strictly: prompts on prefill workers, tokens on decode workers",
    "free": "split with free placement: a prompt may be computed where it is decoded, a request may stay where it was prefilled",
    "colocated": "do not split: every worker computes prompts and tokens",
}


def as_text(plan: Plan, notes: Sequence[str], *, price_per_hour: float | None) -> str:
    parts = [f"note: {note}" for note in notes]
    parts += [headline(plan, price_per_hour), "", _options(plan, price_per_hour), ""]
    parts += [runner_up(plan, price_per_hour), "", _curve(plan), "", "Not modelled: " + "; ".join(NOT_MODELLED) + "."]
    return "\n".join(parts)


def headline(plan: Plan, price_per_hour: float | None) -> str:
    best, curve = plan.best, plan.curve
    cost = _cost(plan, best, price_per_hour)
    return (
        f"{plan.workers} workers: {best.candidate.name} ({MEANS[best.candidate.kind]}).\n"
        f"Goodput {curve.goodput:.4g} requests/s ({curve.low:.4g} to {curve.high:.4g}) at {100 * plan.wanted:.0f} % good, "
        f"{curve.goodput / plan.workers:.3g} a worker, {best.good_tokens_per_s:.4g} good tokens/s{cost}; what binds is {best.binds}."
    )


def runner_up(plan: Plan, price_per_hour: float | None) -> str:
    second = plan.runner_up
    if second is None:
        return "No other deployment serves a rate worth telling."
    less = 100 * (1.0 - second.rate / plan.best.rate)
    missed = ""
    if second.beyond is not None:
        late, slow = (100 * count / second.beyond.requests for count in (second.beyond.late, second.beyond.slow))
        missed = f"; just above its goodput {late:.1f} % miss TTFT and {slow:.1f} % miss TPOT, so {second.binds} binds it"
    cost = _cost(plan, second, price_per_hour)
    compared = f"{less:.1f} % less" if less > 0.0 else "as much, within the search's precision, and less simple"
    return f"Runner-up: {second.candidate.name} with {second.rate:.4g} requests/s, {compared}{cost}{missed}."


def _options(plan: Plan, price_per_hour: float | None) -> str:
    header = ("deployment", "goodput/s", "of best %", "closed form/s", "good tokens/s", "per million good tokens", "binds")
    rows = []
    for option in (plan.best, *plan.others):
        cost = None if price_per_hour is None else plan.cost_per_million(option, price_per_hour)
        rate = option.rate
        rows.append(
            (
                option.candidate.name,
                f"{rate:.4g}" if rate else "too low to tell",
                f"{100 * rate / plan.best.rate:.0f}",
                f"{option.expected.rate:.4g} ({option.expected.limit})",
                f"{option.good_tokens_per_s:.4g}",
                "-" if cost is None else f"{cost:.4g}",
                option.binds,
            )
        )
    return markdown_table(header, rows)


def _curve(plan: Plan) -> str:
    header = ("rate/s", "good %", "95 %", "seeds %", "miss TTFT %", "miss TPOT %")
    rows = [
        (
            f"{point.rate:.4g}",
            f"{100 * point.attained:.1f}",
            f"{100 * point.low:.1f}-{100 * point.high:.1f}",
            f"{100 * point.least:.1f}-{100 * point.most:.1f}",
            f"{100 * point.late:.1f}",
            f"{100 * point.slow:.1f}",
        )
        for point in plan.curve.points
    ]
    title = f"{plan.best.candidate.name}, {plan.seeds} seeds ({plan.simulations} simulations in all):"
    return f"{title}\n{markdown_table(header, rows)}"


def _cost(plan: Plan, option: Option, price_per_hour: float | None) -> str:
    cost = None if price_per_hour is None else plan.cost_per_million(option, price_per_hour)
    return "" if cost is None else f", {cost:.4g} per million of them"
