"""What `segue bench` was asked to measure: its flags, read once."""

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from tools.bench_load.arrivals import Arrivals, parse_arrivals
from tools.bench_load.bench_refused import BenchRefused
from tools.bench_load.endpoint import Endpoint, parse_endpoint
from tools.bench_load.predictions import Prediction, parse_predictions
from tools.bench_load.prompts import IdPrompts, parse_vocabulary
from tools.bench_load.request_class import MIX, Objective, RequestClass, parse_class, parse_mix, parse_objectives, parse_toml

KEY_VARIABLES = ("SEGUE_API_KEY", "OPENAI_API_KEY")
EPILOG = (
    "Latencies count from the scheduled send. A point that stands in --results already is not measured again: the same command "
    "goes on where it was broken off, and writes its reports anew."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    path: Path
    shrink: float
    max_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepOptions:
    """`rates` as given; with `finds_knee` more are tried. `concurrency` set: a closed loop."""

    rates: tuple[float, ...]
    finds_knee: bool
    precision: float
    target: float
    concurrency: int | None
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    results: Path | None
    json: Path | None
    jsonl: Path | None
    html: Path | None
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """`ids` None: prompts are words. `slo_factors`: objectives are these times what is measured unloaded."""

    endpoint: Endpoint
    label: str
    commit: str | None
    classes: tuple[RequestClass, ...]
    objectives: Mapping[str, Objective]
    slo_factors: tuple[float, float] | None
    unloaded_requests: int
    ids: IdPrompts | None
    arrivals: Arrivals
    trace: TraceOptions | None
    sweep: SweepOptions
    requests: int
    warmup: int
    timeout_s: float
    outputs: Outputs


def read_options(arguments: Sequence[str]) -> BenchOptions:
    """Raises BenchRefused."""
    given = _parser().parse_args(arguments)
    classes, objectives = _workload(given)
    endpoint = parse_endpoint(
        given.endpoint, api=given.api, model=given.model or "", api_key=api_key(given.api_key_file), extra=_extra(given.body)
    )
    if given.prompt == "ids" and given.api == "chat":
        raise BenchRefused("--prompt ids needs --api completions: chat takes text")
    rates = _numbers("--rates", given.rates)
    _check(given, rates)
    return BenchOptions(
        endpoint=endpoint,
        label=given.label or endpoint.label,
        commit=given.commit,
        classes=classes,
        objectives=objectives,
        slo_factors=_factors(given.slo_factors),
        unloaded_requests=given.unloaded,
        ids=parse_vocabulary(given.vocabulary) if given.prompt == "ids" else None,
        arrivals=parse_arrivals(given.arrivals),
        trace=None if given.trace is None else TraceOptions(path=given.trace, shrink=given.shrink, max_tokens=given.max_tokens),
        sweep=SweepOptions(
            rates=rates or (() if given.trace else (1.0,)),
            finds_knee=given.find_knee,
            precision=given.precision,
            target=given.target,
            concurrency=given.closed,
            seeds=tuple(int(seed) for seed in _numbers("--seeds", given.seeds)),
        ),
        requests=given.requests,
        warmup=given.warmup,
        timeout_s=given.timeout,
        outputs=Outputs(
            results=given.results, json=given.json, jsonl=given.jsonl, html=given.html, predictions=_predictions(given.predicted)
        ),
    )


def _check(given: argparse.Namespace, rates: Sequence[float]) -> None:
    """What flags allow one by one, and not together or not at such a size."""
    if not all(rate > 0.0 and math.isfinite(rate) for rate in rates):
        raise BenchRefused("--rates takes positive requests a second")
    if given.closed is not None and (given.find_knee or rates or given.trace):
        raise BenchRefused("--closed has no rate: leave out --rates, --find-knee and --trace")
    counts = (given.requests, given.unloaded, 1 if given.closed is None else given.closed)
    if min(counts) < 1 or given.warmup < 0 or not given.timeout > 0 or not given.shrink > 0:
        raise BenchRefused("--requests, --closed, --unloaded, --timeout and --shrink are positive, --warmup at least 0")
    if not 0.0 < given.target < 1.0 or not given.precision > 0.0:
        raise BenchRefused("--target lies between 0 and 1, --precision above 0")


def _workload(given: argparse.Namespace) -> tuple[tuple[RequestClass, ...], dict[str, Objective]]:
    """A file's classes are the mix where none is named."""
    own = [parse_class(text) for text in given.classes]
    objectives: dict[str, Objective] = {}
    if given.classes_file is not None:
        try:
            workload = parse_toml(given.classes_file.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise BenchRefused(f"--classes-file: {error}") from None
        own += workload.classes
        objectives.update(workload.objectives)
    objectives.update(parse_objectives(given.slo))
    mix = given.mix or (",".join(one.name for one in own) if own else MIX)
    classes = parse_mix(mix, own)
    if given.slo and not given.trace:
        unknown = set(parse_objectives(given.slo)) - {one.name for one in classes}
        if unknown:
            raise BenchRefused(f"--slo names {', '.join(sorted(unknown))}, which the mix does not have")
    return classes, objectives


def api_key(path: Path | None) -> str | None:
    """The key in the file, else the environment's. Raises BenchRefused."""
    if path is None:
        return next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
    try:
        key = str(path.read_text("utf-8").strip())
    except (OSError, UnicodeDecodeError) as error:
        raise BenchRefused(f"--api-key-file: {error}") from None
    if not key or not key.isascii() or not key.isprintable():
        raise BenchRefused("--api-key-file: one line, the key")
    return key


def _predictions(path: Path | None) -> tuple[Prediction, ...]:
    try:
        return () if path is None else parse_predictions(path.read_bytes())
    except OSError as error:
        raise BenchRefused(f"--predicted: {error}") from None


def _extra(text: str) -> dict[str, object]:
    try:
        extra = orjson.loads(text)
    except orjson.JSONDecodeError:
        extra = None
    if not isinstance(extra, dict):
        raise BenchRefused("--body takes a JSON object of fields for every request")
    return extra


def _factors(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    numbers = _numbers("--slo-factors", text)
    if len(numbers) != 2 or not min(numbers) > 0.0:
        raise BenchRefused("--slo-factors takes TTFT,TPOT, for example 5,3")
    return numbers[0], numbers[1]


def _numbers(flag: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part)
    except ValueError:
        raise BenchRefused(f"{flag} takes numbers separated by commas") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="segue bench", description="Measure an OpenAI-compatible server under load: which rate it serves well.", epilog=EPILOG
    )
    server = parser.add_argument_group("the server")
    server.add_argument("--endpoint", "--url", default="http://127.0.0.1:8000", metavar="URL", help="default: %(default)s")
    server.add_argument("--model", help="default: the first that the server names")
    server.add_argument("--api-key-file", type=Path, help=f"default: the environment's {' or '.join(KEY_VARIABLES)}")
    server.add_argument("--api", choices=("chat", "completions"), default="chat", help="default: %(default)s")
    server.add_argument("--body", default="{}", metavar="JSON", help="fields for every request's body")
    server.add_argument("--label", help="the server's name in the reports (default: its address)")
    server.add_argument("--commit", help="names the build that serves, part of a result's key (default: this repository's commit)")
    load = parser.add_argument_group("the load")
    load.add_argument("--mix", metavar="NAME:SHARE,…", help=f"default: the own classes, else {MIX} (256+64, 1024+64, 64+128 tokens)")
    load.add_argument(
        "--class", dest="classes", action="append", default=[], metavar="NAME:PROMPT:OUTPUT[:SHARE]", help="an own class"
    )
    load.add_argument("--classes-file", type=Path, metavar="TOML", help="own classes, perhaps with ttft_s and tpot_s")
    load.add_argument("--prompt", choices=("words", "ids"), default="words", help="text, or token ids (completions only)")
    load.add_argument("--vocabulary", default="100:40000", metavar="LOW:HIGH", help="of --prompt ids (default: %(default)s)")
    load.add_argument("--arrivals", default="poisson", help="poisson, constant, gamma:VARIATION (default: %(default)s)")
    load.add_argument("--trace", type=Path, metavar="FILE", help="arrivals and lengths of a trace (Mooncake's JSONL, Azure's CSV)")
    load.add_argument("--shrink", type=float, default=1.0, help="divides a trace's lengths (default: %(default)s)")
    load.add_argument("--max-tokens", type=int, help="leaves out what is longer in a trace")
    load.add_argument("--rates", default="", metavar="R,…", help="requests a second (default: 1; a trace's own)")
    load.add_argument("--find-knee", action="store_true", help="from the first rate on, look for the highest with --target good")
    load.add_argument("--precision", type=float, default=0.1, help="of the knee, relative (default: %(default)s)")
    load.add_argument("--closed", type=int, metavar="N", help="instead of rates: always N requests under way")
    load.add_argument("--requests", "-n", type=int, default=100, help="measured ones a point (default: %(default)s)")
    load.add_argument("--warmup", type=int, default=5, help="requests before them that are not measured (default: %(default)s)")
    load.add_argument("--seeds", default="7", metavar="S,…", help="a point for each, pooled in the curve (default: %(default)s)")
    load.add_argument("--timeout", type=float, default=900.0, help="seconds after the last send until a request is a miss")
    good = parser.add_argument_group("what is good")
    good.add_argument("--slo", default="", metavar="NAME:TTFT_S:TPOT_S,…", help="objectives by class")
    good.add_argument("--slo-factors", metavar="TTFT,TPOT", help="objectives as multiples of this server's unloaded medians: 5,3")
    good.add_argument("--unloaded", type=int, default=7, help="requests a class for that (default: %(default)s)")
    good.add_argument("--target", type=float, default=0.9, help="part of all requests to be good (default: %(default)s)")
    out = parser.add_argument_group("the reports")
    out.add_argument("--results", type=Path, metavar="FILE", help="keeps every point; makes the run resumable")
    out.add_argument("--json", type=Path, metavar="FILE", help="all figures, in the names of vLLM's bench and of aiperf")
    out.add_argument("--jsonl", type=Path, metavar="FILE", help="a line a request")
    out.add_argument("--html", type=Path, metavar="FILE", help="the report with plots, one file")
    out.add_argument("--predicted", type=Path, metavar="FILE", help="of `segue simulate --json`: drawn beside the live points")
    return parser
