"""What `segue simulate` prints: a row a deployment, rows of its classes below it."""

from collections.abc import Sequence

from common.simulation.goodput.deployment import Deployment
from common.simulation.goodput.goodput_knee import Knee
from common.simulation.goodput.goodput_report import ClassReport, GoodputReport, Spread
from tools.bench_engine_columns import markdown_table

HEADER = (
    "workers", "class", "requests", "good %", "95 %", "TTFT %", "TPOT %", "TTFT ms mean/p50/p90/p99", "TPOT ms mean/p50/p90/p99",
    "offered/s", "good/s", "good/s a worker", "split %", "refused",
)  # fmt: skip


def goodput_table(reports: Sequence[tuple[Deployment, GoodputReport]]) -> str:
    rows = []
    for deployment, report in reports:
        whole = (
            f"{report.offered_rps:.2f}",
            f"{report.goodput_rps:.2f}",
            f"{report.goodput_rps / deployment.workers:.2f}",
            f"{100 * report.split_share:.0f}",
        )
        rows.append((deployment.name, *_row(report.total), *whole, str(report.total.refused)))
        rows += [("", *_row(each), "", "", "", "", str(each.refused)) for each in report.classes]
    return markdown_table(HEADER, rows)


def knee_table(knees: Sequence[tuple[Deployment, Knee]]) -> str:
    header = ("workers", "goodput/s", "a worker", "good % there", "rates tried")
    rows = [(d.name, f"{k.rate:.2f}", f"{k.rate / d.workers:.2f}", f"{100 * k.attained:.1f}", str(len(k.tried))) for d, k in knees]
    return markdown_table(header, rows)


def _row(report: ClassReport) -> tuple[str, ...]:
    return (
        report.name,
        str(report.requests),
        f"{100 * report.attained:.1f}",
        f"{100 * report.low:.1f}-{100 * report.high:.1f}",
        f"{100 * report.ttft_attained:.1f}",
        f"{100 * report.tpot_attained:.1f}",
        _milliseconds(report.ttft),
        _milliseconds(report.tpot),
    )


def _milliseconds(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return "/".join(f"{1000 * value:.4g}" for value in (spread.mean, spread.p50, spread.p90, spread.p99))
