"""Where a request's time went, in five stages: prefill queue, prefill, transfer, decode queue, decode.

The stages come from the server's own timeline of a request: named moments, in seconds since it was accepted. A stage is the time
between the two moments that bound it; a moment that a server does not record leaves the stages beside it unknown, and is named.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tools.bench_load.quantiles import Summary, summarise
from tools.bench_load.request_result import RequestResult


@dataclass(frozen=True, slots=True)
class Stage:
    """From one moment to another; `None` is the moment of acceptance."""

    name: str
    begins: str | None
    ends: str


STAGES = (
    Stage("prefill queue", None, "prefill_started"),
    Stage("prefill", "prefill_started", "first_token"),
    Stage("transfer", "first_token", "transferred"),
    Stage("decode queue", "transferred", "decode_started"),
    Stage("decode", "decode_started", "end"),
)
COARSE = (Stage("until the first token", None, "first_token"), Stage("after it", "first_token", "end"))
"""What the two moments that every timeline has can tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSummary:
    """`timelines`: of how many requests there is one. `missing`: moments that none of them has."""

    timelines: int
    stages: dict[str, Summary]
    missing: tuple[str, ...]


def stages_of(moments: Mapping[str, float], stages: Sequence[Stage] = STAGES) -> dict[str, float]:
    """Seconds of each stage that both its moments bound, never negative."""
    return {
        stage.name: max(0.0, moments[stage.ends] - (0.0 if stage.begins is None else moments[stage.begins]))
        for stage in stages
        if stage.ends in moments and (stage.begins is None or stage.begins in moments)
    }


def summarise_stages(results: Sequence[RequestResult]) -> StageSummary:
    """The five stages as far as they are recorded, and the two coarse ones where they are not all."""
    timelines = [one.stages_s for one in results if one.stages_s]
    wanted = [stage.ends for stage in STAGES]
    missing = tuple(moment for moment in wanted if timelines and not any(moment in moments for moments in timelines))
    shown = (*COARSE, *STAGES) if missing else STAGES
    found: dict[str, list[float]] = {}
    for moments in timelines:
        for name, seconds in stages_of(moments, shown).items():
            found.setdefault(name, []).append(seconds)
    summaries = {name: summary for name, values in found.items() if (summary := summarise(values)) is not None}
    return StageSummary(timelines=len(timelines), stages=summaries, missing=missing)
