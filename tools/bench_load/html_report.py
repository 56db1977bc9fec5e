"""The report of `segue bench` as one HTML file that needs no other: attainment by rate, latency CDFs, a Gantt chart of requests."""

from collections.abc import Callable, Iterable, Sequence
from html import escape

from tools.bench_load.figures import BenchReport, PointFigures
from tools.bench_load.predictions import Prediction
from tools.bench_load.quantiles import wilson
from tools.bench_load.request_result import RequestResult
from tools.bench_load.svg_plot import Bar, Line, bar_plot, line_plot
from tools.bench_load.text_report import as_text

CDF_POINTS = 200
MAX_GANTT = 150

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:1340px;margin:2rem auto;padding:0 1rem;color:#1e293b;background:#fff}
svg{width:100%;height:auto}svg text{font-size:11px;fill:currentColor}.grid{stroke:#94a3b8;stroke-width:.4;opacity:.5}
.rule{stroke:currentColor;stroke-dasharray:5 4;opacity:.6}.legend span{margin-right:1.2em;font-size:13px}
.legend i{display:inline-block;width:.8em;height:.8em;margin-right:.4em;border-radius:2px}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(400px,1fr));gap:1.2rem}
pre{overflow-x:auto;font-size:13px;background:#f1f5f9;padding:1rem;border-radius:6px}
@media(prefers-color-scheme:dark){body{color:#e2e8f0;background:#0f172a}pre{background:#1e293b}}
"""


def as_html(report: BenchReport, title: str, predictions: Sequence[Prediction] = ()) -> str:
    sections = [_section("Good requests by rate", _curve(report, predictions), "Whiskers: 95 % (Wilson). Dashed: the wanted part.")]
    sections += [
        _section(name, _cdf(report.points, read), "The part of all requests, one line a point; times from the scheduled send.")
        for name, read in _CDFS
    ]
    gantts = "".join(_gantt(figures) for figures in report.points)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style></head>'
        f'<body><h1>{escape(title)}</h1><div class="plots">{"".join(sections)}</div>'
        f"<h2>Requests</h2>{gantts}<h2>Figures</h2><pre>{escape(as_text(report))}</pre></body></html>\n"
    )


def _section(name: str, plot: str, note: str) -> str:
    return f"<section><h3>{escape(name)}</h3>{plot}<p><small>{escape(note)}</small></p></section>"


def _curve(report: BenchReport, predictions: Sequence[Prediction]) -> str:
    intervals = [wilson(point.good, point.total) for point in report.curve]
    lines = [
        Line(
            name="all",
            points=[(point.real_rate, 100 * point.share) for point in report.curve],
            low=[100 * interval.low for interval in intervals],
            high=[100 * interval.high for interval in intervals],
            marks=True,
        )
    ]
    kinds = sorted({kind for figures in report.points for kind in figures.by_class})
    if len(kinds) > 1:
        lines += [Line(name=kind, points=_class_curve(report.points, kind), marks=True) for kind in kinds]
    lines += [
        Line(name=f"predicted: {one.deployment}", points=[(rate, 100 * share) for rate, share in one.shares.items()], marks=True)
        for one in predictions
    ]
    return line_plot(
        [line for line in lines if line.points],
        x_label="requests a second",
        y_label="good, %",
        y_range=(0.0, 103.0),
        rule=100 * report.target,
    )


def _class_curve(points: Sequence[PointFigures], kind: str) -> list[tuple[float, float]]:
    """The seeds of one rate together, as in the curve of all."""
    groups: dict[float, list[PointFigures]] = {}
    for figures in points:
        if figures.point.real_rate is not None and kind in figures.by_class:
            groups.setdefault(figures.point.key.rate or figures.point.real_rate, []).append(figures)
    curve = []
    for group in groups.values():
        judged = [figures.by_class[kind] for figures in group]
        rate = sum(figures.point.real_rate or 0.0 for figures in group) / len(group)
        curve.append((rate, 100 * sum(one.good for one in judged) / sum(one.requests for one in judged)))
    return sorted(curve)


def _ttfts(results: Sequence[RequestResult]) -> list[float]:
    return [one.ttft_s * 1e3 for one in results if one.ttft_s is not None]


def _tpots(results: Sequence[RequestResult]) -> list[float]:
    return [one.tpot_s * 1e3 for one in results if one.tpot_s is not None and one.output_tokens > 1]


def _gaps(results: Sequence[RequestResult]) -> list[float]:
    return [gap * 1e3 for one in results for gap in one.gaps_s]


_CDFS: tuple[tuple[str, Callable[[Sequence[RequestResult]], list[float]]], ...] = (
    ("TTFT, ms", _ttfts),
    ("TPOT, ms", _tpots),
    ("ITL, ms", _gaps),
)


def _cdf(points: Iterable[PointFigures], read: Callable[[Sequence[RequestResult]], list[float]]) -> str:
    lines = []
    for figures in points:
        values = sorted(read([one for one in figures.point.measured if one.is_complete]))
        if values:
            places = sorted({round(step * (len(values) - 1) / CDF_POINTS) for step in range(CDF_POINTS + 1)})
            lines.append(Line(name=_name(figures), points=[(values[place], 100 * (place + 1) / len(values)) for place in places]))
    return line_plot(lines, x_label="ms", y_label="part, %", y_range=(0.0, 103.0))


def _gantt(figures: PointFigures) -> str:
    """The first requests by schedule, warm-up included: waiting for the first token, then streaming; red where it failed."""
    shown = figures.point.results[:MAX_GANTT]
    bars = [bar for row, one in enumerate(shown) for bar in _bars(row, one)]
    legend = ["to the first token", "failed", "streaming"]
    left_out = len(figures.point.results) - len(shown)
    note = f"The first {len(shown)}; {left_out} more are not drawn." if left_out > 0 else "All requests, warm-up included."
    return _section(_name(figures), bar_plot(bars, x_label="seconds", y_label="requests", legend=legend), note)


def _bars(row: int, one: RequestResult) -> Iterable[Bar]:
    title = f"{one.number} {one.kind}{'' if one.measured else ' (warm-up)'}: TTFT {(one.ttft_s or 0) * 1e3:.0f} ms"
    if not one.is_complete:
        yield Bar(row=row, begins=one.scheduled_s, ends=one.ended_s, colour=1, title=f"{title}, {one.error}")
        return
    yield Bar(row=row, begins=one.scheduled_s, ends=one.arrivals_s[0], colour=0, title=title)
    yield Bar(row=row, begins=one.arrivals_s[0], ends=one.ended_s, colour=2, title=title)


def _name(figures: PointFigures) -> str:
    key = figures.point.key
    rate = f"{key.rate:g} req/s" if key.rate is not None else key.arrivals
    return f"{key.label} {rate}, seed {key.seed}"
