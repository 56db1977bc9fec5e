"""What `bench-engine` has measured, put beside what the machine's limits allow: figures, tables and JSON."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import msgspec

from common.engine.model_config import ModelConfig
from common.engine.step_limits import MachineLimits, decode_limit_s, prefill_limit_s
from tools.bench_engine_machine import Machine
from tools.bench_engine_options import FLOATS
from tools.bench_engine_peers import Missing
from tools.bench_engine_rounds import Samples
from tools.bench_engine_subject import Case, PrefillCase, Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseFigure:
    """Medians. `share` is the limit's part of the time: 1 at the limit; None where no limit is known for the weights."""

    subject: str
    weights: str
    kind: str
    batch: int
    tokens: int
    seconds: float
    samples: int
    limit_s: float | None

    @property
    def share(self) -> float | None:
        return None if self.limit_s is None else self.limit_s / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakFigure:
    how: str
    dtype: str
    operations_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawFigure:
    rows: int
    how: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Rates a second. `own_share` is the part of the time in which the measuring process had its core."""

    model: str
    machine: Machine
    clock: str
    threads: int
    rounds: int
    own_share: float
    read_bytes_per_s: float
    read_range: tuple[float, float]
    peaks: tuple[PeakFigure, ...]
    cases: tuple[CaseFigure, ...]
    draws: tuple[DrawFigure, ...]
    missing: tuple[Missing, ...]

    def as_json(self) -> bytes:
        shares = [figure.share for figure in self.cases]
        fields = asdict(self)
        for figure, share in zip(fields["cases"], shares, strict=True):
            figure["share_of_limit"] = share
        return msgspec.json.format(msgspec.json.encode(fields), indent=2)


def make_report(
    samples: Samples,
    subjects: Sequence[Subject],
    config: ModelConfig,
    *,
    model: str,
    machine: Machine,
    clock: str,
    threads: int,
    rounds: int,
    weight_bytes: Mapping[str, float],
    missing: Sequence[Missing],
) -> Report:
    """`weight_bytes` are those that a step reads, by the kind of weights."""
    read = statistics.median(samples.reads)
    peaks = tuple(PeakFigure(how=way.name, dtype=way.dtype, operations_per_s=statistics.median(r)) for way, r in samples.rates.items())
    cases = tuple(
        _figure(
            subjects[place],
            case,
            times,
            _limit_s(config, _limits(peaks, read, subjects[place].weights), subjects[place], case, weight_bytes),
        )
        for (place, case), times in sorted(samples.times.items(), key=lambda item: item[0][0])
        if times
    )
    draws = tuple(DrawFigure(rows=draw.rows, how=draw.how, seconds=statistics.median(times)) for draw, times in samples.draws.items())
    return Report(
        model=model,
        machine=machine,
        clock=clock,
        threads=threads,
        rounds=rounds,
        own_share=samples.own_share,
        read_bytes_per_s=read,
        read_range=(min(samples.reads), max(samples.reads)),
        peaks=peaks,
        cases=cases,
        draws=draws,
        missing=tuple(missing),
    )


def _limits(peaks: Sequence[PeakFigure], read: float, weights: str) -> MachineLimits:
    """Weights narrower than float32 may be widened and multiplied as float32, where that is quicker; quantised ones always are."""
    dtypes = {"float32", *({weights} & set(FLOATS))}
    best = max(peak.operations_per_s for peak in peaks if peak.dtype in dtypes)
    return MachineLimits(read_bytes_per_s=read, flop_per_s=best)


def _limit_s(
    config: ModelConfig, machine: MachineLimits, subject: Subject, case: Case, weight_bytes: Mapping[str, float]
) -> float | None:
    """None where it is not known how many bytes of weights the subject reads."""
    read_bytes = weight_bytes.get(subject.weights)
    if read_bytes is None:
        return None
    if isinstance(case, PrefillCase):
        return prefill_limit_s(config, machine, tokens=case.tokens)
    contexts = [case.context] * case.batch
    return decode_limit_s(config, machine, contexts, weight_bytes=read_bytes, kv_item_bytes=subject.kv_item_bytes)


def _figure(subject: Subject, case: Case, times: Sequence[float], limit_s: float | None) -> CaseFigure:
    return CaseFigure(
        subject=subject.name,
        weights=subject.weights,
        kind="prefill" if isinstance(case, PrefillCase) else "decode",
        batch=1 if isinstance(case, PrefillCase) else case.batch,
        tokens=case.tokens if isinstance(case, PrefillCase) else case.context,
        seconds=statistics.median(times),
        samples=len(times),
        limit_s=limit_s,
    )
