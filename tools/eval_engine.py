"""`segue eval-engine`: does every forward, with every dtype of weights, still say what the model says?

Each is compared with torch in float32: the perplexity of a fixed text and how often the likeliest next token is the same there
(both are given the text, so nothing adds up), then greedy continuations of prompts cut out of that text, made in batches as a
worker makes them. A first difference between tokens whose reference log-probabilities lie within 0.001 is a tie: either is right.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

from common.engine.model_cache import default_cache_dir
from common.engine.model_files import ModelFolder
from common.engine.model_source import LoadFormat, ModelSpec, resolve_model
from common.values.errors import ModelError, SegueError
from tools.bench_engine_columns import markdown_table
from tools.bench_engine_options import FORWARDS
from tools.engine_variants import Forward, Variant, Weights, kv_pool, load_variant
from tools.eval_engine_compare import Agreement, compare
from tools.eval_engine_material import Material, fixed_material
from tools.eval_engine_run import Answers, answer

_BLOCK_SIZE = 16
_REFERENCE = Variant(forward="torch", weights="float32")


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    try:
        found = _evaluate(options)
    except SegueError as error:
        print(f"segue eval-engine: {error}", file=sys.stderr)
        return 1
    print(as_text(found, options.tokens))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(agreement) for agreement in found], indent=2), encoding="utf-8")
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="segue eval-engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="as for segue serve; without one, the small model of the package registry")
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto", help="dummy: random weights")
    parser.add_argument("--weights", default="float32,bfloat16", help="default: %(default)s")
    parser.add_argument("--prompts", type=int, default=32, help="how many continuations (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of each continuation (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="continuations at a time (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args(arguments)
    if min(options.prompts, options.tokens, options.batch, options.threads) < 1:
        parser.error("--prompts, --tokens, --batch and --threads are at least 1")
    return options


def _evaluate(options: argparse.Namespace) -> list[Agreement]:
    cache_dir = default_cache_dir(os.environ)
    spec = ModelSpec(model=options.model, load_format=cast("LoadFormat", options.load_format))
    folder = resolve_model(spec, cache_dir)
    material = fixed_material(folder, cache_dir, prompts=options.prompts, new_tokens=options.tokens)
    reference = _answers(options, folder, _REFERENCE, material)
    found = [compare(_REFERENCE.name, reference, reference, material)]
    for weights in cast("Sequence[Weights]", options.weights.split(",")):
        for forward in cast("Sequence[Forward]", FORWARDS):
            variant = Variant(forward=forward, weights=weights)
            if variant == _REFERENCE or (variant.forward == "torch" and variant.quantized):
                continue
            try:
                answers = _answers(options, folder, variant, material)
            except ModelError as error:
                print(f"{variant.name}: not compared: {error}", file=sys.stderr)
                continue
            found.append(compare(variant.name, answers, reference, material))
    return found


def _answers(options: argparse.Namespace, folder: ModelFolder, variant: Variant, material: Material) -> Answers:
    """Loaded, asked and dropped: one model at a time is in memory."""
    print(f"asking {variant.name}", file=sys.stderr, flush=True)
    longest = max(len(material.text), max(map(len, material.prompts)) + options.tokens + 1)
    blocks = options.batch * -(-longest // _BLOCK_SIZE)
    pool = kv_pool(folder, variant.dtype, block_size=_BLOCK_SIZE, blocks=blocks)
    loaded = load_variant(folder, variant, pool, threads=options.threads)
    return answer(loaded, material, new_tokens=options.tokens, batch=options.batch)


def as_text(found: Sequence[Agreement], new_tokens: int) -> str:
    columns = [
        "by",
        "perplexity",
        "to reference",
        "same likeliest token",
        "equal continuations",
        "of them ties",
        "equal tokens before",
    ]
    rows = [
        [
            one.name,
            f"{one.perplexity:.4f}",
            f"{one.perplexity_ratio:.5f}",
            f"{one.same_likeliest:.2%}",
            f"{one.equal + one.ties} of {one.continuations}",
            str(one.ties),
            f"{one.equal_tokens_share:.1%}",
        ]
        for one in found
    ]
    heading = f"{found[0].scored} tokens of fixed text; greedy continuations of {new_tokens} tokens, until the first difference"
    return f"{heading}\n\n{markdown_table(columns, rows)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
