"""The plan as one HTML file: the printed report, and attainment against rate as a plot."""

from collections.abc import Sequence
from html import escape

from common.simulation.planning.plan import Plan
from tools.bench_load.svg_plot import Line, line_plot
from tools.plan_text import as_text

STYLE = (
    "body{font:15px system-ui;max-width:60em;margin:2em auto}pre{overflow:auto;font-size:12px}"
    "svg text{font-size:11px}.grid{stroke:#ddd}.rule{stroke:#888;stroke-dasharray:4}"
    ".legend i{display:inline-block;width:1em;height:.6em;margin:0 .4em 0 1em}"
)


def as_html(plan: Plan, notes: Sequence[str], *, price_per_hour: float | None) -> str:
    points = plan.curve.points
    line = Line(
        name=plan.best.candidate.name,
        points=[(point.rate, 100 * point.attained) for point in points],
        low=[100 * point.low for point in points],
        high=[100 * point.high for point in points],
        marks=True,
    )
    plot = line_plot([line], x_label="requests/s", y_label="good %", rule=100 * plan.wanted)
    text = escape(as_text(plan, notes, price_per_hour=price_per_hour))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>segue plan</title><style>{STYLE}</style>"
        f"<h1>{plan.workers} workers: {escape(plan.best.candidate.name)}</h1>{plot}<pre>{text}</pre></html>\n"
    )
