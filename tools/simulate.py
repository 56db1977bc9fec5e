"""`segue simulate`: how many requests would be good on a deployment, in virtual time, with the mesh's own policies.

segue simulate --workers 1:1 --rate 3                      one prefill, one decode worker
segue simulate --workers 4:4 --workers 3:5 --workers 8     two splits and eight colocated workers, the same requests
segue simulate --workers 4:4 --find-goodput                the highest rate with 90 % of the requests good
segue simulate --trace conversation_trace.jsonl --keep-share 0.1
segue simulate --class chat,input=256,output=64,share=50,ttft-ms=900,tpot-ms=77 --class rag,input=1024,output=64,share=20
segue simulate --preset distserve --rate 3                 DistServe's simulator, policies and all
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

from common.simulation.goodput.deployment import Deployment
from common.simulation.goodput.distserve_preset import distserve_deployment
from common.simulation.goodput.goodput_knee import Knee, find_knee
from common.simulation.goodput.goodput_report import GoodputReport, report_of
from common.simulation.goodput.goodput_simulator import GoodputSimulator
from common.values.errors import SettingsError
from tools.simulate_requests import Requests, add_request_options, requests_of
from tools.simulate_table import goodput_table, knee_table
from tools.simulate_workers import add_worker_options, workers_like

DEFAULT_WORKERS = ("1:1",)


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    try:
        requests = requests_of(options)
        deployments = [_deployment(options, workers) for workers in options.workers or DEFAULT_WORKERS]
        for note in requests.notes:
            print(f"note: {note}")
        if options.find_goodput:
            knees = [(deployment, _knee(deployment, requests, options)) for deployment in deployments]
            print(knee_table(knees))
            _write_json(options.json, [{"deployment": d.name, **asdict(knee)} for d, knee in knees])
            return 0
        reports = [(deployment, _simulate(deployment, requests, options.rate, options.seed)) for deployment in deployments]
    except (SettingsError, ValueError, OSError) as error:
        print(f"segue simulate: {error}", file=sys.stderr)
        return 2
    print(goodput_table(reports))
    _write_json(options.json, [{"deployment": d.name, **asdict(report)} for d, report in reports])
    return 0


def _simulate(deployment: Deployment, requests: Requests, rate: float, seed: int) -> GoodputReport:
    arrivals = requests.at(rate, deployment.kv_tokens)
    flights = GoodputSimulator(deployment, requests.objectives, Random(seed)).run(arrivals)
    return report_of(flights, first_token_counts=deployment.first_token_counts)


def _knee(deployment: Deployment, requests: Requests, options: argparse.Namespace) -> Knee:
    def attained_at(rate: float) -> float:
        return _simulate(deployment, requests, rate, options.seed).total.attained

    return find_knee(attained_at, wanted=options.attain / 100.0, start=options.rate)


def _deployment(options: argparse.Namespace, workers: str) -> Deployment:
    prefill, decode, both = _counts(workers)
    if options.preset == "distserve":
        return distserve_deployment(prefill=prefill, decode=decode)
    like = workers_like(options)
    return replace(like, prefill=prefill, decode=decode, both=both, policies=replace(like.policies, free="free" in workers))


def _counts(workers: str) -> tuple[int, int, int]:
    """`P:D`, with `free` behind it for free placement, or the number of colocated workers."""
    text = workers.replace("free", "").strip(" +,")
    try:
        if ":" in text:
            prefill, decode = (int(count) for count in text.split(":"))
            return prefill, decode, 0
        return 0, 0, int(text)
    except ValueError:
        raise SettingsError(f"--workers takes P:D, P:D+free or a number of colocated workers, not {workers!r}") from None


def _write_json(path: str | None, rows: list[dict[str, object]]) -> None:
    if path is not None:
        Path(path).write_text(json.dumps(rows, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="segue simulate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add_request_options(parser)
    add_worker_options(parser)
    add("--workers", action="append", help="P:D, P:D+free or a number of colocated workers; repeat to compare (default 1:1)")
    add("--preset", choices=["distserve"], help="workers and policies of DistServe's simulator; only P:D counts")
    add("--rate", type=float, default=1.0, help="requests a second, or where --find-goodput begins (default 1)")
    add("--find-goodput", action="store_true", help="search for the highest rate that attains --attain")
    add("--attain", type=float, default=90.0, help="percent of the requests that have to be good (default 90)")
    add("--json", metavar="FILE", help="write all figures there")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
