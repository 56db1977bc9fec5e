"""From the options of `segue bench` to measured points: prepares prompts, runs what the results file lacks, follows the sweep."""

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from common.simulation.goodput.flight import Arrival
from common.simulation.goodput.rescaling import at_rate, fitting, shrunk
from common.simulation.goodput.traces import trace_arrivals
from tools.bench_load.arrivals import PlannedRequest, closed_loop, open_loop, real_rate, replay
from tools.bench_load.bench_refused import BenchRefused
from tools.bench_load.endpoint import Endpoint
from tools.bench_load.figures import rate_curve
from tools.bench_load.http_client import HttpClient
from tools.bench_load.knee import next_rate
from tools.bench_load.point_run import PointRun, Progress
from tools.bench_load.progress import ProgressBar
from tools.bench_load.prompts import IdPrompts, Prompts, learn_words
from tools.bench_load.request_class import Objective, RequestClass, describe
from tools.bench_load.results_file import Point, PointKey, ResultsFile
from tools.bench_load.server_models import first_model
from tools.bench_load.timelines import with_timelines
from tools.bench_load_options import BenchOptions

TRACE_CLASS = "trace"
UNLOADED_WARMUP = 2


class BenchRun:
    """`cpu` and `commit` are part of every result's key."""

    def __init__(self, options: BenchOptions, results: ResultsFile, bar: ProgressBar, *, cpu: str, commit: str) -> None:
        self._options = options
        self._results = results
        self._bar = bar
        self._cpu = cpu
        self._commit = commit
        self._endpoint = options.endpoint
        self._prompts: Prompts | None = options.ids
        self.notes: list[str] = []

    async def run(self) -> tuple[dict[str, Objective], list[Point]]:
        """Raises BenchRefused."""
        objectives = await self._objectives()
        return objectives, await self._points(objectives)

    async def _objectives(self) -> dict[str, Objective]:
        """Those given, and the missing ones as multiples of what is measured unloaded."""
        found = dict(self._options.objectives)
        factors = self._options.slo_factors
        if factors is None:
            return found
        for one in self._options.classes:
            if one.name not in found:
                point = await self._closed((one,), 1, self._options.unloaded_requests, UNLOADED_WARMUP, seed=0)
                found[one.name] = _objective(one, point, factors)
        return found

    async def _points(self, objectives: Mapping[str, Objective]) -> list[Point]:
        """All points of the sweep, measured now or before."""
        options, sweep = self._options, self._options.sweep
        await self._name_model()
        if sweep.concurrency is not None:
            return [
                await self._closed(options.classes, sweep.concurrency, options.requests, options.warmup, seed=seed)
                for seed in sweep.seeds
            ]
        points = [await self._open(rate, seed) for rate in sweep.rates or (None,) for seed in sweep.seeds]
        while sweep.finds_knee:
            curve = rate_curve(points, objectives)
            if not curve:
                raise BenchRefused("--find-knee needs objectives: --slo or --slo-factors")
            first = sweep.rates[0] if sweep.rates else curve[0].rate
            rate = next_rate(curve, target=sweep.target, first=first, precision=sweep.precision)
            if rate is None:
                break
            points += [await self._open(rate, seed) for seed in sweep.seeds]
        return points

    async def _open(self, rate: float | None, seed: int) -> Point:
        options = self._options
        if options.trace is not None:
            rows, workload = self._trace(rate, seed)
            plan = replay(rows, kind=TRACE_CLASS, warmup=options.warmup)
            arrivals = "trace"
        else:
            if rate is None:
                raise BenchRefused("an open loop needs a rate")
            plan = open_loop(options.classes, options.arrivals, rate=rate, count=options.requests, warmup=options.warmup, seed=seed)
            arrivals, workload = str(options.arrivals), describe(options.classes)
        key = await self._key(workload, arrivals, rate, seed, requests=options.requests, warmup=options.warmup)
        return await self._measured(key, plan, concurrency=None)

    async def _closed(self, classes: Sequence[RequestClass], concurrency: int, count: int, warmup: int, *, seed: int) -> Point:
        plan = closed_loop(classes, count=count, warmup=warmup, seed=seed)
        key = await self._key(describe(classes), f"closed:{concurrency}", None, seed, requests=count, warmup=warmup)
        return await self._measured(key, plan, concurrency=concurrency)

    def _trace(self, rate: float | None, seed: int) -> tuple[list[Arrival], str]:
        trace = self._options.trace
        assert trace is not None
        try:
            arrivals = shrunk(trace_arrivals(trace.path.read_text("utf-8"), random.Random(seed)), trace.shrink).arrivals
            if trace.max_tokens is not None:
                kept = fitting(arrivals, trace.max_tokens)
                arrivals = kept.arrivals
                if kept.note:
                    self._note(kept.note)
            arrivals = arrivals[: self._options.warmup + self._options.requests]
            if arrivals and rate is not None:
                arrivals = at_rate(arrivals, rate).arrivals
        except (OSError, ValueError) as error:
            raise BenchRefused(f"--trace: {error}") from None
        if not arrivals:
            raise BenchRefused("--trace: nothing of it is left")
        workload = f"{trace.path.name} / {trace.shrink:g}, up to {trace.max_tokens or 'any'} tokens"
        return arrivals, workload

    async def _key(self, workload: str, arrivals: str, rate: float | None, seed: int, *, requests: int, warmup: int) -> PointKey:
        await self._name_model()
        return PointKey(
            cpu=self._cpu,
            commit=self._commit,
            label=self._options.label,
            model=self._endpoint.model,
            api=self._endpoint.api,
            workload=workload,
            arrivals=arrivals,
            rate=rate,
            seed=seed,
            requests=requests,
            warmup=warmup,
        )

    async def _measured(self, key: PointKey, plan: Sequence[PlannedRequest], *, concurrency: int | None) -> Point:
        known = self._results.get(key)
        if known is not None:
            return known
        client = HttpClient(self._endpoint, time.monotonic)
        prompts = await self._prompts_for(client)
        rng = random.Random(time.time_ns())  # new prompts every time: a server may remember those of an earlier run
        requests = [_request(self._endpoint, prompts, planned, rng) for planned in plan]
        started_at, began = time.time(), time.monotonic()
        title = f"{key.arrivals} {'' if key.rate is None else f'{key.rate:g} req/s '}seed {key.seed}"

        def show(progress: Progress) -> None:
            now = time.monotonic()
            self._bar.draw(title, progress, now - began, now=now)

        run = PointRun(plan, requests, client, time.monotonic, timeout_s=self._options.timeout_s, on_progress=show)
        results = await (run.open_loop() if concurrency is None else run.closed_loop(concurrency))
        results = await with_timelines(results, client)
        point = Point(key=key, started_at=started_at, real_rate=real_rate(plan), results=tuple(results))
        self._results.add(point)
        return point

    async def _prompts_for(self, client: HttpClient) -> Prompts:
        if self._prompts is None:
            self._prompts = await learn_words(client.count_prompt_tokens)
        return self._prompts

    async def _name_model(self) -> None:
        if self._endpoint.model:
            return
        name = await first_model(self._endpoint, HttpClient(self._endpoint, time.monotonic))
        self._endpoint = replace(self._endpoint, model=name)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _request(endpoint: Endpoint, prompts: Prompts, planned: PlannedRequest, rng: random.Random) -> bytes:
    match prompts:
        case IdPrompts():
            return endpoint.ask(prompts.ids(planned.prompt_tokens, rng), planned.output_tokens)
        case _:
            return endpoint.ask(prompts.text(planned.prompt_tokens, rng), planned.output_tokens)


def _objective(one: RequestClass, point: Point, factors: tuple[float, float]) -> Objective:
    complete = [result for result in point.measured if result.is_complete]
    ttfts = [result.ttft_s for result in complete if result.ttft_s is not None]
    tpots = [result.tpot_s for result in complete if result.tpot_s is not None]
    if len(complete) < len(point.measured) or not ttfts:
        errors = {result.error for result in point.measured if result.error}
        raise BenchRefused(f"class {one.name} cannot be measured unloaded: {'; '.join(sorted(errors)) or 'no answers'}")
    return Objective(ttft_s=factors[0] * statistics.median(ttfts), tpot_s=max(1e-6, factors[1] * statistics.median(tpots)))
