"""Which requests `segue simulate` sends: drawn from classes, or those of a trace."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from random import Random

from common.simulation.goodput.flight import Arrival
from common.simulation.goodput.rescaling import at_rate, fitting, stretched, thinned
from common.simulation.goodput.traces import trace_arrivals
from common.simulation.goodput.workloads import Lengths, RequestClass, Workload, total_rate
from common.values.errors import SettingsError
from common.values.objectives import Objectives

CLASS_KEYS = ("input", "output", "share", "sigma", "ttft-ms", "tpot-ms", "ttft-stretch")


@dataclass(slots=True)
class Requests:
    """`trace` None: drawn anew for each rate from the same seed. A trace has its own rate; another one stretches its time."""

    objectives: dict[str, Objectives]
    count: int
    seed: int
    notes: list[str]
    workload: Workload | None = None
    trace: list[Arrival] | None = None
    find_rate: bool = False

    def at(self, rate: float, kv_tokens: int) -> list[Arrival]:
        """Requests that no worker could hold are left out."""
        if self.workload is not None:
            arrivals = self.workload.draw(self.count, rate, Random(self.seed))
        elif self.trace is not None and self.find_rate:
            arrivals = at_rate(self.trace, rate).arrivals
        else:
            arrivals = self.trace or []
        kept = fitting(arrivals, kv_tokens)
        if kept.note and kept.note not in self.notes:
            self.notes.append(kept.note)
            print(f"note: {kept.note}")
        return kept.arrivals


def add_request_options(parser: argparse.ArgumentParser, *, requests: int = 5000) -> None:
    add = parser.add_argument
    add("--requests", type=int, default=requests, help=f"how many are drawn (default {requests})")
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
    add("--seed", type=int, default=0)


def requests_of(options: argparse.Namespace) -> Requests:
    default = Objectives(ttft_s=options.ttft_ms / 1000.0, tpot_s=options.tpot_ms / 1000.0, ttft_stretch=options.ttft_stretch)
    if options.trace is not None:
        return _traced(options, default)
    classes = tuple(_class(text, options) for text in options.classes or ["all"])
    workload = Workload(classes=classes, variation=options.cv)
    return Requests(objectives=workload.objectives, count=options.requests, seed=options.seed, notes=[], workload=workload)


def _traced(options: argparse.Namespace, objectives: Objectives) -> Requests:
    path, rng = Path(options.trace), Random(options.seed)
    arrivals = trace_arrivals(path.read_text("utf-8"), rng)
    notes = [f"{path.name}: {len(arrivals)} requests at {total_rate(arrivals):.2f}/s"]
    if options.keep_share != 1.0:
        kept = thinned(arrivals, options.keep_share, rng)
        arrivals = kept.arrivals
        notes.append(kept.note)
    if options.stretch != 1.0:
        slower = stretched(arrivals, options.stretch)
        arrivals = slower.arrivals
        notes.append(slower.note)
    if options.find_goodput:
        notes.append("rates are reached by stretching the trace's time")
    if len(arrivals) < 2:
        raise SettingsError(f"{path} leaves fewer than two requests")
    return Requests(
        objectives={"": objectives},
        count=len(arrivals),
        seed=options.seed,
        notes=notes,
        trace=arrivals,
        find_rate=options.find_goodput,
    )


def _class(text: str, options: argparse.Namespace) -> RequestClass:
    """`NAME,input=256,output=64,share=50,ttft-ms=900,tpot-ms=77`; what is left out is as the options say."""
    name, *pairs = text.split(",")
    values = {
        "input": options.input,
        "output": options.output,
        "share": 1.0,
        "sigma": options.sigma,
        "ttft-ms": options.ttft_ms,
        "tpot-ms": options.tpot_ms,
        "ttft-stretch": options.ttft_stretch,
    }
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in CLASS_KEYS:
            raise SettingsError(f"--class {name}: {key!r} is none of {', '.join(CLASS_KEYS)}")
        try:
            values[key] = float(value)
        except ValueError:
            raise SettingsError(f"--class {name}: {key} takes a number, not {value!r}") from None
    return RequestClass(
        name=name,
        prompt=Lengths(mean=values["input"], sigma=values["sigma"], most=_longest(options)),
        output=Lengths(mean=values["output"], sigma=values["sigma"], most=_longest(options)),
        objectives=Objectives(
            ttft_s=values["ttft-ms"] / 1000.0, tpot_s=values["tpot-ms"] / 1000.0, ttft_stretch=values["ttft-stretch"]
        ),
        share=values["share"],
    )


def _longest(options: argparse.Namespace) -> int:
    """Of a prompt and of an output: a heavy tail is cut so that both fit a worker."""
    return max(1, min(4096, int(options.kv_tokens) // 2))
