"""`segue bench-engine`: how near the engine comes to what this machine's memory and multipliers allow.

Pinned to `--cores`, in one run: memory read bandwidth and peak operations (the best of torch, oneDNN, our own product and loops in
registers); then prefill and decode steps of every forward and every kind of weights (a dtype;
`gguf`: the blocks that the model came with; `int8`, `int4`: its weights rounded), with vLLM and llama.cpp beside them where they
are installed, on the same cores. Everything takes turns, round by round, and medians are reported: a machine that drifts drifts
for all. `common/engine/step_limits.py` says how the limits are computed. `--clock cpu` counts CPU time instead of time: on a
machine that does other work it is the steadier figure (llama.cpp's programs report time in any case).
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from common.values.errors import SegueError
from tools.bench_engine_options import DEFAULT_WEIGHTS, BenchOptions


def main(arguments: Sequence[str]) -> int:
    options, json_path = _parse(arguments)
    os.sched_setaffinity(0, options.cores)
    from tools.bench_engine_run import measure  # loads torch, which should see these cores only
    from tools.bench_engine_table import as_text

    try:
        report = measure(options, lambda what: print(what, file=sys.stderr, flush=True))
    except SegueError as error:
        print(f"segue bench-engine: {error}", file=sys.stderr)
        return 1
    print(as_text(report))
    if json_path is not None:
        json_path.write_bytes(report.as_json())
    return 0


def _parse(arguments: Sequence[str]) -> tuple[BenchOptions, Path | None]:
    parser = argparse.ArgumentParser(
        prog="segue bench-engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="as for segue serve; without one, the small model of the package registry")
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto", help="dummy: random weights")
    parser.add_argument("--cores", type=_numbers, default=(0,), help="such as 0 or 0,1 (default: 0)")
    parser.add_argument("--threads", type=int, help="compute threads of every engine (default: one for each core)")
    parser.add_argument("--forwards", type=_texts, help="torch, native (default: all that work here)")
    parser.add_argument("--weights", type=_texts, default=DEFAULT_WEIGHTS, help=f"default: {','.join(DEFAULT_WEIGHTS)}; float16 too")
    parser.add_argument("--prefill", type=_numbers, default=(128, 512, 1024), help="lengths of prompts (default: 128,512,1024)")
    parser.add_argument("--batches", type=_numbers, default=(1, 4, 16, 32), help="rows of a decode step (default: 1,4,16,32)")
    parser.add_argument("--contexts", type=_numbers, default=(256, 512), help="of each row (default: 256,512)")
    parser.add_argument("--max-num-batched-tokens", type=int, help="prefill in chunks of this size (default: whole prompts)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="measured decode steps a round (default: 5)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--vllm-python", help="the Python of an environment that has vLLM")
    parser.add_argument("--llama", help="the folder of llama.cpp's llama-bench and llama-batched-bench")
    parser.add_argument("--llama-model", type=_pair, action="append", default=[], help="such as bfloat16=FILE.gguf; may be repeated")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    given = vars(parser.parse_args(arguments))
    json_path = given.pop("json")
    given["llama_model"] = tuple(given["llama_model"])
    given["cores"] = tuple(sorted(set(given["cores"])))
    options = BenchOptions(**given)
    if (problem := options.problem(frozenset(os.sched_getaffinity(0)))) is not None:
        parser.error(problem)
    return options, json_path


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(",") if part)
    if min(numbers, default=-1) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers")
    return numbers


def _texts(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _pair(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} should be WEIGHTS=FILE")
    return name, Path(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
