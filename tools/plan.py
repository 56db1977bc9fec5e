"""`segue plan`: split or not, and how: the roles that serve most requests well, for a demand, objectives and a number of workers.

segue plan --workers 8 --input 755 --output 200 --ttft-ms 250 --tpot-ms 100
segue plan --workers 8 --workload "ShareGPT 755/200" --price-per-hour 2.5 --html plan.html
segue plan --workers 4 --step-time calibration.json --class chat,input=256,share=50,ttft-ms=900 --class rag,input=1024,share=20
segue plan --workers 8 --trace conversation_trace.jsonl --ttft-ms 30000
segue plan --table                                         the known workloads: planned beside exhaustive search
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from common.simulation.planning.demand import Demand, DrawnDemand, TraceDemand
from common.simulation.planning.plan import PlanQuestion, make_plan
from common.values.errors import SettingsError
from tools.plan_html import as_html
from tools.plan_table import print_table
from tools.plan_text import as_text
from tools.plan_workloads import KNOWN, mixed
from tools.simulate_requests import add_request_options, requests_of
from tools.simulate_workers import add_worker_options, workers_like


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    try:
        question = _question(options)
        if options.table:
            return print_table(question, options.workload, exhaustive=not options.planned_only, json_path=options.json)
        demand, notes = _demand(options)
        plan = make_plan(question, demand, told=_tell if sys.stderr.isatty() else lambda _: None)
    except (SettingsError, ValueError, OSError) as error:
        print(f"segue plan: {error}", file=sys.stderr)
        return 2
    if sys.stderr.isatty():
        _tell("")
    print(as_text(plan, notes, price_per_hour=options.price_per_hour))
    if options.json is not None:
        Path(options.json).write_text(json.dumps({"notes": notes, **asdict(plan)}, indent=1) + "\n")
    if options.html is not None:
        Path(options.html).write_text(as_html(plan, notes, price_per_hour=options.price_per_hour))
    return 0


def _question(options: argparse.Namespace) -> PlanQuestion:
    if not 0.0 < options.attain < 100.0 or min(options.workers, options.requests, options.seeds) < 1:
        raise SettingsError("--attain is a percentage; --workers, --requests and --seeds are at least 1")
    return PlanQuestion(
        workers=options.workers,
        like=workers_like(options),
        wanted=options.attain / 100.0,
        every_class=options.every_class,
        requests=options.requests,
        seeds=options.seeds,
    )


def _demand(options: argparse.Namespace) -> tuple[Demand, list[str]]:
    if options.workload or options.workload_file:
        workload = mixed(options.workload, Path(options.workload_file or KNOWN), variation=options.cv)
        return DrawnDemand(workload, options.kv_tokens), [", ".join(each.name for each in workload.classes)]
    requests = requests_of(options)
    if requests.trace is not None:
        return TraceDemand(requests.trace, requests.objectives[""], options.kv_tokens), requests.notes
    assert requests.workload is not None
    return DrawnDemand(requests.workload, options.kv_tokens), requests.notes


def _tell(progress: str) -> None:
    print(f"\r\033[K{progress}", end="", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="segue plan", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.set_defaults(find_goodput=True)
    add = parser.add_argument
    add("--workers", type=int, default=8, help="how many there are to give roles to (default 8)")
    add("--workload", action="append", default=[], metavar="NAME", help="one of the known workloads; repeat to mix them")
    add("--workload-file", metavar="FILE", help="JSON with workloads, as tools/plan_workloads.json has them")
    add("--attain", type=float, default=90.0, help="percent of the requests that have to be good (default 90)")
    add("--every-class", action="store_true", help="each class has to attain that, not all requests together")
    add("--price-per-hour", type=float, help="of one worker: what a million good tokens costs")
    add("--seeds", type=int, default=3, help="of the goodput curve (default 3)")
    add("--json", metavar="FILE", help="write all figures there")
    add("--html", metavar="FILE", help="write the report with its plot there")
    add("--table", action="store_true", help="plan each known workload (or those named), beside exhaustive search")
    add("--planned-only", action="store_true", help="with --table: no exhaustive search")
    add_request_options(parser, requests=1500)
    add_worker_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
