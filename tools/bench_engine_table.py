"""The report of `bench-engine` as text: one table for prefill, one for decode, the limits in the first rows of both."""

from collections.abc import Iterable

from tools.bench_engine_columns import case_names, markdown_table
from tools.bench_engine_ratios import four_bit_line, peer_table
from tools.bench_engine_report import CaseFigure, Report

_QUIET_SHARE = 0.97


def as_text(report: Report) -> str:
    parts = [
        "\n".join(_heading(report)),
        _peaks(report),
        "Prefill, tok/s (and the part of the limit that it reaches)\n" + _cases(report, "prefill"),
        "Decode, ms a step (and the limit's part of it); b: rows, c: context\n" + _cases(report, "decode"),
        four_bit_line(report),
        *(_headed(f"{kind.capitalize()}: the peer's time / ours", peer_table(report, kind)) for kind in ("prefill", "decode")),
        _draws(report),
        *(f"{missing.name}: {missing.reason}" for missing in report.missing),
    ]
    return "\n\n".join(part for part in parts if part)


def _headed(heading: str, table: str) -> str:
    return f"{heading}\n{table}" if table else ""


def warnings(report: Report) -> list[str]:
    found = []
    if not report.machine.quiet:
        found.append(f"the machine was not quiet at the start: others used {report.machine.busy_share:.0%} of the measured core(s)")
    if report.own_share < _QUIET_SHARE:
        found.append(f"this process had its core(s) for only {report.own_share:.0%} of the time: compare ratios, not times")
    return [f"WARNING: {text}" for text in found]


def _heading(report: Report) -> Iterable[str]:
    yield report.machine.describe()
    yield f"{report.model}; {report.threads} compute thread(s); medians of {report.rounds} rounds, in {report.clock} time"
    yield f"this process had its core(s) for {report.own_share:.0%} of the time"
    yield from warnings(report)
    least, most = (rate / 1e9 for rate in report.read_range)
    yield f"memory read: {report.read_bytes_per_s / 1e9:.1f} GB/s ({least:.1f} to {most:.1f})"


def _peaks(report: Report) -> str:
    dtypes = list(dict.fromkeys(peak.dtype for peak in report.peaks))
    rows = []
    for how in dict.fromkeys(peak.how for peak in report.peaks):
        by_dtype = {peak.dtype: peak.operations_per_s / 1e9 for peak in report.peaks if peak.how == how}
        rows.append([how, *(f"{by_dtype[dtype]:.0f}" if dtype in by_dtype else "" for dtype in dtypes)])
    return "Peak, 10^9 operations/s\n" + markdown_table(["by", *dtypes], rows)


def _cases(report: Report, kind: str) -> str:
    figures = [figure for figure in report.cases if figure.kind == kind]
    columns = sorted({(figure.tokens, figure.batch) for figure in figures})
    rows = []
    for weights in dict.fromkeys(figure.weights for figure in figures):
        mine = [figure for figure in figures if figure.weights == weights]
        limits = {(figure.tokens, figure.batch): figure for figure in mine if figure.limit_s is not None}
        rows.append(["limit", weights, *(_limit_cell(limits.get(column)) for column in columns)])
        for subject in dict.fromkeys(figure.subject for figure in mine):
            measured = {(figure.tokens, figure.batch): figure for figure in mine if figure.subject == subject}
            rows.append([subject, weights, *(_cell(measured.get(column)) for column in columns)])
    return markdown_table(["by", "weights", *case_names(columns, kind)], rows)


def _cell(figure: CaseFigure | None) -> str:
    if figure is None:
        return ""
    share = "" if figure.share is None else f" {figure.share:.0%}"
    return _value(figure, figure.seconds) + share


def _limit_cell(figure: CaseFigure | None) -> str:
    return "" if figure is None or figure.limit_s is None else _value(figure, figure.limit_s)


def _value(figure: CaseFigure, seconds: float) -> str:
    return f"{figure.tokens / seconds:.0f}" if figure.kind == "prefill" else f"{1e3 * seconds:.1f}"


def _draws(report: Report) -> str:
    if not report.draws:
        return ""
    hows = list(dict.fromkeys(draw.how for draw in report.draws))
    by_place = {(draw.rows, draw.how): f"{1e3 * draw.seconds:.2f}" for draw in report.draws}
    rows = [[str(count), *(by_place[count, how] for how in hows)] for count in sorted({draw.rows for draw in report.draws})]
    return "Drawing the tokens of a step, ms (part of the above, where greedy)\n" + markdown_table(["rows", *hows], rows)
