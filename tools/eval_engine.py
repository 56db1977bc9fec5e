"""`segue eval-engine`: does every way of computing an answer still say what the model says?

First, in float32: the same greedy answers one at a time and in batches, prompts whole and in chunks, through a worker alone and
through two workers that hand the sequence over. Each answer is checked whole by one forward of transformers over prompt and
answer. A token that is not transformers' choice counts as tied where the two logits lie within 0.001, else as wrong, and the
command then ends with status 1. Between the ways, logits are compared bit by bit (log-probabilities, through workers).

Then other weights against float32: answers, and perplexity and divergence on a fixed text. `gguf` are the blocks that the model
came with, multiplied as they are: their bits must be those of their expansion.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

from common.engine.model_cache import default_cache_dir
from common.engine.model_source import LoadFormat, ModelSpec, resolve_model
from common.values.errors import SegueError
from tools.engine_variants import Forward
from tools.eval_engine_material import fixed_material
from tools.eval_engine_table import as_text
from tools.eval_engine_ways import Evaluation

FORWARDS: tuple[Forward, ...] = ("native", "torch")


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    cache_dir = default_cache_dir(os.environ)
    try:
        folder = resolve_model(ModelSpec(model=options.model, load_format=cast("LoadFormat", options.load_format)), cache_dir)
        material = fixed_material(folder, cache_dir, prompts=options.prompts, new_tokens=options.tokens)
        evaluation = Evaluation(folder, material, forward=options.forward, new_tokens=options.tokens, threads=options.threads)
        report = asyncio.run(evaluation.run([weights for weights in options.weights.split(",") if weights]))
    except SegueError as error:
        print(f"segue eval-engine: {error}", file=sys.stderr)
        return 1
    print(as_text(report))
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(report), indent=2), encoding="utf-8")
    return 0 if report.holds else 1


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="segue eval-engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="as for segue serve; without one, the small model of the package registry")
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto", help="dummy: random weights")
    parser.add_argument("--forward", choices=FORWARDS, default="native", help="default: %(default)s")
    parser.add_argument("--weights", default="gguf,bfloat16,int8,int4", help="held against float32 (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=32, help="how many answers (default: %(default)s; the whole proof is 200)")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the forwards that run alone (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args(arguments)
    if min(options.prompts, options.tokens, options.threads) < 1:
        parser.error("--prompts, --tokens and --threads are at least 1")
    known = {"gguf", "bfloat16", "float16", "int8", "int4"}
    if wrong := {weights for weights in options.weights.split(",") if weights} - known:
        parser.error(f"--weights takes {', '.join(sorted(known))}, not {', '.join(sorted(wrong))}")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
