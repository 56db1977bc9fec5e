"""`segue bench`: goodput of an OpenAI-compatible server, open loop, with one client for us and for our peers."""

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import orjson

from tools.bench_engine_machine import cpu_name
from tools.bench_load.bench_refused import BenchRefused
from tools.bench_load.export import report_json, request_lines
from tools.bench_load.figures import BenchReport, report_of
from tools.bench_load.html_report import as_html
from tools.bench_load.progress import ProgressBar
from tools.bench_load.request_class import Objective
from tools.bench_load.results_file import Point, ResultsFile
from tools.bench_load.text_report import as_text
from tools.bench_load_options import Outputs, read_options
from tools.bench_load_run import BenchRun

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str]) -> int:
    try:
        options = read_options(arguments)
        results = ResultsFile(options.outputs.results)
        commit = options.commit or repository_commit(ROOT)
        run = BenchRun(options, results, ProgressBar(), cpu=cpu_name(), commit=commit)
        objectives, points = asyncio.run(run.run())
        report = report_of(points, objectives, target=options.sweep.target)
        _write(report, points, options.outputs, f"{options.label}: goodput")
    except (BenchRefused, OSError) as error:
        print(f"segue bench: {error}", file=sys.stderr)
        return 1
    for note in run.notes:
        print(f"note: {note}")
    print(_objectives(objectives) + as_text(report))
    return 0 if all(figures.completed for figures in report.points) else 1


def repository_commit(root: Path) -> str:
    """With a plus where files differ from it; "unknown" outside of a repository."""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
        ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return ended.stdout.strip()


def _objectives(objectives: dict[str, Objective]) -> str:
    lines = [f"{name}: TTFT {one.ttft_s * 1e3:.0f} ms, TPOT {one.tpot_s * 1e3:.1f} ms" for name, one in objectives.items()]
    return f"good is: {'; '.join(lines)}\n\n" if lines else ""


def _write(report: BenchReport, points: Sequence[Point], outputs: Outputs, title: str) -> None:
    if outputs.json is not None:
        outputs.json.write_bytes(orjson.dumps(report_json(report), option=orjson.OPT_INDENT_2) + b"\n")
    if outputs.jsonl is not None:
        outputs.jsonl.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in request_lines(points, report.objectives)))
    if outputs.html is not None:
        outputs.html.write_text(as_html(report, title, outputs.predictions), "utf-8")
