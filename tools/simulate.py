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
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import get_args

from common.policy.admission import LatePolicy
from common.policy.placement import PlacementRule
from common.policy.prefill_queue import BatchLimits, PrefillOrder
from common.simulation.goodput.deployment import Deployment, Policies, TransferTime
from common.simulation.goodput.distserve_preset import KV_TOKENS, distserve_deployment, opt_13b
from common.simulation.goodput.goodput_knee import Knee, find_knee
from common.simulation.goodput.goodput_report import GoodputReport, report_of
from common.simulation.goodput.goodput_simulator import GoodputSimulator
from common.values.errors import SettingsError
from tools.simulate_requests import Requests, requests_of
from tools.simulate_step_time import read_step_time
from tools.simulate_table import goodput_table, knee_table

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
    return Deployment(
        prefill=prefill,
        decode=decode,
        both=both,
        step_time=opt_13b() if options.step_time == "opt-13b" else read_step_time(Path(options.step_time)),
        kv_tokens=options.kv_tokens,
        max_sequences=options.max_num_seqs,
        batch=BatchLimits(max_tokens=options.prefill_batch),
        step_tokens=options.max_num_batched_tokens,
        transfer=TransferTime(base_s=options.transfer_ms / 1000.0, per_token_s=options.transfer_us_per_token / 1e6),
        policies=Policies(
            order=options.order,
            prefill_rule=options.placement,
            decode_rule=options.placement,
            chunk_tokens=options.chunk or None,
            free="free" in workers,
            late=options.late,
        ),
        prefix_blocks=options.prefix_blocks,
    )


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
    add("--workers", action="append", help="P:D, P:D+free or a number of colocated workers; repeat to compare (default 1:1)")
    add("--preset", choices=["distserve"], help="workers and policies of DistServe's simulator; only P:D counts")
    add("--step-time", default="opt-13b", help="opt-13b (on an A100), or a JSON file with prefill and decode coefficients")
    add("--rate", type=float, default=1.0, help="requests a second, or where --find-goodput begins (default 1)")
    add("--requests", type=int, default=5000, help="how many are drawn (default 5000)")
    add("--cv", type=float, default=1.0, help="variation of the time between arrivals: 1 is Poisson, more is Gamma (default 1)")
    add("--class", action="append", dest="classes", metavar="NAME,KEY=VALUE…", help="input, output, share, sigma, ttft-ms, tpot-ms")
    add("--input", type=float, default=755.0, help="mean prompt tokens (default 755)")
    add("--output", type=float, default=200.0, help="mean output tokens (default 200)")
    add("--sigma", type=float, default=1.0, help="of the lognormal lengths; 0: always the mean (default 1)")
    add("--ttft-ms", type=float, default=250.0, help="TTFT objective (default 250)")
    add("--ttft-stretch", type=float, default=0.0, help="granted on top: that many times the prompt's unloaded prefill (default 0)")
    add("--tpot-ms", type=float, default=100.0, help="TPOT objective (default 100)")
    add("--trace", help="a Mooncake trace (.jsonl) or an Azure trace (.csv) in place of drawn requests")
    add("--keep-share", type=float, default=1.0, help="of the trace's requests, that share at random (default 1)")
    add("--stretch", type=float, default=1.0, help="the trace's times, that much longer (default 1)")
    add("--order", choices=get_args(PrefillOrder), default="feasible_first", help="of waiting prompts")
    add("--placement", choices=get_args(PlacementRule), default="least_seconds", help="which worker")
    add("--late", choices=get_args(LatePolicy), help="admission: what a request that cannot be good gets (default: no admission)")
    add("--chunk", type=int, default=0, help="prefill workers compute longer prompts in chunks of that (default 0: whole)")
    add("--prefill-batch", type=int, default=2048, help="tokens of one prefill batch (default 2048)")
    add("--max-num-batched-tokens", type=int, default=256, help="positions of a step that mixes (default 256)")
    add("--max-num-seqs", type=int, default=512, help="sequences of a worker (default 512)")
    add("--kv-tokens", type=int, default=KV_TOKENS, help=f"KV tokens of a worker (default {KV_TOKENS})")
    add(
        "--prefix-blocks",
        type=int,
        default=0,
        help="blocks of 512 tokens of each worker's prefix cache, for Mooncake traces (default 0)",
    )
    add("--transfer-ms", type=float, default=0.0, help="of a hand-off, not hidden (default 0)")
    add("--transfer-us-per-token", type=float, default=0.0, help="the same, a prompt token (default 0)")
    add("--seed", type=int, default=0)
    add("--find-goodput", action="store_true", help="search for the highest rate that attains --attain")
    add("--attain", type=float, default=90.0, help="percent of the requests that have to be good (default 90)")
    add("--json", metavar="FILE", help="write all figures there")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
