"""Which workers `segue simulate` and `segue plan` are told of: how fast they are, what they hold, which policies they run."""

import argparse
from pathlib import Path
from typing import get_args

from common.policy.admission import LatePolicy
from common.policy.placement import PlacementRule
from common.policy.prefill_queue import BatchLimits, PrefillOrder
from common.simulation.goodput.deployment import Deployment, Policies, TransferTime
from common.simulation.goodput.distserve_preset import KV_TOKENS, opt_13b
from tools.simulate_step_time import read_step_time


def add_worker_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--step-time", default="opt-13b", help="opt-13b (on an A100), or a JSON file with prefill and decode coefficients")
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


def workers_like(options: argparse.Namespace) -> Deployment:
    """One prefill and one decode worker as the options say; how many there are is for the caller."""
    return Deployment(
        prefill=1,
        decode=1,
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
            late=options.late,
        ),
        prefix_blocks=options.prefix_blocks,
    )
