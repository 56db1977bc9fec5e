"""The rounds of `bench-engine`: in each, the machine's limits and every subject's every case are measured once, in turns."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from common.engine.machine_peaks import Clock, MachinePeaks
from common.engine.sampler_cost import SamplerCost
from common.engine.torch_peaks import Product
from tools.bench_engine_subject import Case, PrefillCase, Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to compute, which is a candidate for the peak of `dtype`."""

    name: str
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Drawing the tokens of `rows` rows, `how` in words."""

    rows: int
    how: str


@dataclass(kw_only=True)
class Samples:
    """All that was measured: rates a second, and seconds. Subjects are named by their place in the list of subjects."""

    reads: list[float] = field(default_factory=list)
    rates: dict[Way, list[float]] = field(default_factory=dict)
    times: dict[tuple[int, Case], list[float]] = field(default_factory=dict)
    draws: dict[Draw, list[float]] = field(default_factory=dict)
    wall_s: float = 0.0
    cpu_s: float = 0.0

    @property
    def own_share(self) -> float:
        """The part of the time in which this process was running, while it measured itself: 1 where nothing disturbed it."""
        return min(1.0, self.cpu_s / self.wall_s) if self.wall_s else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What to measure. `steps` is the number of measured steps in one visit to a decode case."""

    peaks: MachinePeaks
    products: Sequence[Product]
    subjects: Sequence[Subject]
    cases: Sequence[Case]
    samplers: Sequence[tuple[Draw, SamplerCost]]
    clock: Clock
    steps: int

    def run(self, rounds: int, on_progress: Callable[[str], None]) -> Samples:
        samples = Samples()
        for number in range(rounds):
            on_progress(f"round {number + 1} of {rounds}: the machine's limits")
            wall, cpu = time.perf_counter(), time.process_time()
            self._measure_machine(samples)
            samples.wall_s += time.perf_counter() - wall
            samples.cpu_s += time.process_time() - cpu
            for case in self.cases:
                on_progress(f"round {number + 1} of {rounds}: {case}")
                self._measure_case(samples, case, number)
        return samples

    def _measure_machine(self, samples: Samples) -> None:
        samples.reads.append(self.peaks.read_bytes_per_s())
        for loop in self.peaks.loops:
            samples.rates.setdefault(Way(name=loop.name, dtype=loop.dtype), []).append(self.peaks.operations_per_s(loop))
        for product in self.products:
            samples.rates.setdefault(Way(name=product.name, dtype=product.dtype), []).append(product.operations_per_s())
        for draw, cost in self.samplers:
            samples.draws.setdefault(draw, []).append(cost.run_s(self.clock))

    def _measure_case(self, samples: Samples, case: Case, number: int) -> None:
        for place, subject in enumerate(self.subjects):
            if subject.visits is not None and number >= subject.visits:
                continue
            times = subject.prefill_s(case) if isinstance(case, PrefillCase) else subject.decode_s(case, steps=self.steps)
            samples.times.setdefault((place, case), []).extend(times)
