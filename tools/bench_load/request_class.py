"""Classes of requests: how long their prompts and answers are, how many of all requests they make up, and when they are good.

On the command line a class is `NAME:PROMPT:OUTPUT[:SHARE]`, an objective `NAME:TTFT_S:TPOT_S`; a TOML file says the same.
"""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tools.bench_load.bench_refused import BenchRefused


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestClass:
    """Lengths in tokens; `share` is a weight among the classes of one mix."""

    name: str
    prompt_tokens: int
    output_tokens: int
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1 or not self.share > 0.0:
            raise BenchRefused(f"class {self.name}: lengths and share must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A request is good if its first token came within `ttft_s` and its mean time between tokens is at most `tpot_s`."""

    ttft_s: float
    tpot_s: float

    def __post_init__(self) -> None:
        if not (self.ttft_s > 0.0 and self.tpot_s > 0.0):
            raise BenchRefused("objectives are positive seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Objectives by class name."""

    classes: tuple[RequestClass, ...]
    objectives: Mapping[str, Objective]


KNOWN = {
    "W1": RequestClass(name="W1", prompt_tokens=256, output_tokens=64, share=50),
    "W2": RequestClass(name="W2", prompt_tokens=1024, output_tokens=64, share=20),
    "W3": RequestClass(name="W3", prompt_tokens=64, output_tokens=128, share=30),
}
MIX = "W1:50,W2:20,W3:30"


def parse_class(text: str) -> RequestClass:
    """`NAME:PROMPT:OUTPUT[:SHARE]`."""
    try:
        name, prompt, output, *share = text.split(":")
        return RequestClass(name=name, prompt_tokens=int(prompt), output_tokens=int(output), share=float(share[0]) if share else 1.0)
    except ValueError:
        raise BenchRefused(f"class {text!r}: NAME:PROMPT:OUTPUT[:SHARE], for example chat:256:64:50") from None


def parse_mix(text: str, own: Iterable[RequestClass] = ()) -> tuple[RequestClass, ...]:
    """`NAME[:SHARE],…` of known classes and `own` ones."""
    known = {**KNOWN, **{one.name: one for one in own}}
    chosen: dict[str, RequestClass] = {}
    for part in text.split(","):
        name, _, share = part.strip().partition(":")
        if name not in known or name in chosen:
            raise BenchRefused(f"mix {text!r}: {name!r} is not one of {', '.join(known)}, each at most once")
        try:
            weight = float(share) if share else known[name].share
        except ValueError:
            raise BenchRefused(f"mix {text!r}: the share of {name} is a number") from None
        given = known[name]
        chosen[name] = RequestClass(name=name, prompt_tokens=given.prompt_tokens, output_tokens=given.output_tokens, share=weight)
    return tuple(chosen.values())


def parse_objectives(text: str) -> dict[str, Objective]:
    """`NAME:TTFT_S:TPOT_S,…`; empty text is none."""
    objectives: dict[str, Objective] = {}
    for part in filter(None, text.split(",")):
        try:
            name, ttft, tpot = part.strip().split(":")
            objectives[name] = Objective(ttft_s=float(ttft), tpot_s=float(tpot))
        except ValueError:
            raise BenchRefused(f"objective {part!r}: NAME:TTFT_S:TPOT_S, for example W1:0.93:0.077") from None
    return objectives


def parse_toml(text: str) -> Workload:
    """`[classes.NAME]` with prompt_tokens, output_tokens and perhaps share, ttft_s, tpot_s."""
    try:
        tables = tomllib.loads(text)["classes"]
        classes: list[RequestClass] = []
        objectives: dict[str, Objective] = {}
        for name, table in tables.items():
            unknown = set(table) - {"prompt_tokens", "output_tokens", "share", "ttft_s", "tpot_s"}
            if unknown:
                raise BenchRefused(f"classes.{name}: {', '.join(sorted(unknown))} is not known")
            classes.append(
                RequestClass(
                    name=name,
                    prompt_tokens=int(table["prompt_tokens"]),
                    output_tokens=int(table["output_tokens"]),
                    share=float(table.get("share", 1.0)),
                )
            )
            if "ttft_s" in table or "tpot_s" in table:
                objectives[name] = Objective(ttft_s=float(table["ttft_s"]), tpot_s=float(table["tpot_s"]))
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BenchRefused(f"the file of classes needs [classes.NAME] with prompt_tokens and output_tokens: {error!r}") from None
    if not classes:
        raise BenchRefused("the file of classes names no class")
    return Workload(classes=tuple(classes), objectives=objectives)


def describe(classes: Sequence[RequestClass]) -> str:
    """One line that tells mixes apart: it is part of a result's key."""
    return ",".join(f"{one.name}:{one.prompt_tokens}:{one.output_tokens}:{one.share:g}" for one in classes)
