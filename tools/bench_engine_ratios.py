"""What `bench-engine`'s figures say of each other: a four-bit step beside float32's limit, and our engine beside its peers."""

from collections.abc import Sequence

from tools.bench_engine_columns import case_names, markdown_table
from tools.bench_engine_report import CaseFigure, Report
from tools.bench_engine_subject import OWN

_FOUR_BITS = ("gguf", "int4")
_OURS = f"{OWN}, native"
_MOST = 0.45


def four_bit_line(report: Report) -> str:
    """A step of one row from weights of four bits, as a part of the least time that float32 weights would take."""
    limits = {figure.tokens: figure.limit_s for figure in _single_rows(report) if figure.weights == "float32"}
    parts = [
        f"{figure.weights} c{figure.tokens} {figure.seconds / limit:.2f}"
        for figure in _single_rows(report)
        if figure.subject == _OURS and figure.weights in _FOUR_BITS and (limit := limits.get(figure.tokens)) is not None
    ]
    return f"4-bit step / float32 limit, b1 (wanted: at most {_MOST}): {', '.join(parts)}" if parts else ""


def peer_table(report: Report, kind: str) -> str:
    """Their time divided by ours with the same weights: above 1, ours is quicker. Empty where there are no peers."""
    figures = [figure for figure in report.cases if figure.kind == kind]
    columns = sorted({(figure.tokens, figure.batch) for figure in figures})
    rows = []
    for subject, weights in dict.fromkeys((figure.subject, figure.weights) for figure in figures):
        if subject.startswith(OWN):
            continue
        mine, theirs = _by_column(figures, _OURS, weights), _by_column(figures, subject, weights)
        both = [f"{theirs[column] / mine[column]:.2f}" if column in mine and column in theirs else "" for column in columns]
        if any(both):
            rows.append([subject, weights, *both])
    return markdown_table(["peer", "weights", *case_names(columns, kind)], rows) if rows else ""


def _by_column(figures: Sequence[CaseFigure], subject: str, weights: str) -> dict[tuple[int, int], float]:
    wanted = [figure for figure in figures if figure.subject == subject and figure.weights == weights]
    return {(figure.tokens, figure.batch): figure.seconds for figure in wanted}


def _single_rows(report: Report) -> list[CaseFigure]:
    return [figure for figure in report.cases if figure.kind == "decode" and figure.batch == 1]
