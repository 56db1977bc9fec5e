"""Measures a server from outside: says what it will send, learns words that are one token each, sends, and fits."""

import random
import time
from dataclasses import replace

from common.policy.calibration import Calibration, CalibrationSubject
from tools.bench_load.arrivals import PlannedRequest
from tools.bench_load.bench_refused import BenchRefused
from tools.bench_load.endpoint import Endpoint
from tools.bench_load.http_client import HttpClient
from tools.bench_load.point_run import PointRun, Progress
from tools.bench_load.prompts import WordPrompts, learn_words
from tools.bench_load.request_result import RequestResult
from tools.bench_load.server_models import MODELS_PATH, first_model
from tools.calibration.endpoint_fit import EndpointTimes, endpoint_calibration
from tools.calibration.endpoint_options import EndpointOptions
from tools.calibration.endpoint_plan import LEAST_POINTS, LoadGroup, LoadPlan, Pace, least_requests, load_plan
from tools.calibration.endpoint_samples import pace_samples, prompt_samples
from tools.calibration.progress_line import ProgressLine

ROUND_TRIPS = 9
WORD_QUESTIONS = 40
"""At most, of one token each, out of the bound on requests."""
WARM_UPS = 2
WARM_UP_TOKENS = 128
WARM_UP_ANSWER = 16
LEARNING = WORD_QUESTIONS + ROUND_TRIPS + WARM_UPS
"""Requests before the plan's, at most."""


async def calibrate_endpoint(options: EndpointOptions, *, build: str, bar: ProgressLine) -> Calibration | None:
    """None of a dry run. Raises BenchRefused."""
    bar.tell(announcement(options))
    if options.is_dry_run:
        return None
    client = HttpClient(options.endpoint, time.monotonic)
    endpoint = options.endpoint
    if not endpoint.model:
        endpoint = replace(endpoint, model=await first_model(endpoint, client))
        client = HttpClient(endpoint, time.monotonic)
    prompts = await learn_words(_Counter(client, WORD_QUESTIONS).count)
    times = EndpointTimes()
    sender = _Sender(endpoint, client, prompts, timeout_s=options.timeout_s)
    for _ in range(WARM_UPS):
        pace = _pace(await sender.send(_warm_up(prompts)))
    plan = _plan(options, least_prompt=prompts.overhead_tokens + 1, pace=pace)
    for _ in range(ROUND_TRIPS):
        times.round_trips_s.append(await _round_trip_s(client))
    sent = 0
    for group in plan.groups:
        bar.draw(group.name, sent, plan.requests, "requests")
        _take(times, group, await sender.send(group))
        sent += len(group.requests)
    times.most_streams = plan.most_at_once
    subject = CalibrationSubject(model=endpoint.model, endpoint=endpoint.label)
    return endpoint_calibration(times, subject, build=build, now=time.time())


def announcement(options: EndpointOptions) -> str:
    """Before anything is sent. The template's own tokens, which only the server knows, are part of each prompt's length."""
    plan = _plan(options, least_prompt=1, pace=None)
    return (
        f"will send {options.endpoint.label} at most {plan.requests + LEARNING} requests: {LEARNING} to learn its words and its "
        f"round trip, then {plan.rounds} rounds, in all {plan.requests} requests of {plan.prompt_tokens} prompt tokens and "
        f"at most {plan.output_tokens} answer tokens, at most {plan.most_at_once} at once"
    )


def _plan(options: EndpointOptions, *, least_prompt: int, pace: Pace | None) -> LoadPlan:
    plan = load_plan(
        max_requests=options.max_requests - LEARNING,
        max_concurrency=options.max_concurrency,
        max_prompt=options.max_prompt,
        least_prompt=least_prompt,
        seed=options.seed,
        pace=pace,
    )
    if plan is None:
        least = LEARNING + least_requests(options.max_concurrency, options.max_prompt)
        raise BenchRefused(
            f"too little load is allowed: with --max-concurrency {options.max_concurrency}, --max-requests is at least {least}; "
            f"prompts have {least_prompt} tokens or more, and --max-prompt {options.max_prompt} has to leave {LEAST_POINTS} lengths"
        )
    return plan


class _Counter:
    """Counts prompt tokens within a bound of questions."""

    def __init__(self, client: HttpClient, questions: int) -> None:
        self._client = client
        self._left = questions

    async def count(self, text: str) -> int:
        if self._left == 0:
            raise BenchRefused(
                f"the server's tokenizer splits too many common words: {WORD_QUESTIONS} questions did not sort them out"
            )
        self._left -= 1
        return await self._client.count_prompt_tokens(text)


class _Sender:
    """Prompts are new each time: a server may remember those of an earlier run."""

    def __init__(self, endpoint: Endpoint, client: HttpClient, prompts: WordPrompts, *, timeout_s: float) -> None:
        self._endpoint = endpoint
        self._client = client
        self._prompts = prompts
        self._timeout_s = timeout_s
        self._random = random.Random(time.time_ns())

    async def send(self, group: LoadGroup) -> list[RequestResult]:
        requests = [
            self._endpoint.ask(self._prompts.text(one.prompt_tokens, self._random), one.output_tokens) for one in group.requests
        ]
        run = PointRun(group.requests, requests, self._client, time.monotonic, timeout_s=self._timeout_s, on_progress=_unshown)
        return await run.open_loop()


def _unshown(progress: Progress) -> None:
    """A group is short: the line shows groups."""


def _warm_up(prompts: WordPrompts) -> LoadGroup:
    length = max(WARM_UP_TOKENS, prompts.overhead_tokens + 1)
    request = PlannedRequest(number=0, at_s=0.0, kind="warm-up", prompt_tokens=length, output_tokens=WARM_UP_ANSWER, measured=False)
    return LoadGroup(name="warm-up", kind="alone", requests=(request,))


def _pace(results: list[RequestResult]) -> Pace | None:
    """None where it did not come through: then answers are as long as they may be."""
    for result in results:
        if result.is_complete and result.ttft_s is not None and result.tpot_s:
            return Pace(prompt_token_s=result.ttft_s / result.prompt_tokens, answer_token_s=result.tpot_s)
    return None


def _take(times: EndpointTimes, group: LoadGroup, results: list[RequestResult]) -> None:
    times.failures += [result.error for result in results if result.error is not None]
    match group.kind:
        case "alone":
            times.prompts += prompt_samples(results)
        case "burst":
            times.paces.setdefault(group.name, []).extend(pace_samples(results))


async def _round_trip_s(client: HttpClient) -> float:
    began = time.monotonic()
    answer = await client.get(MODELS_PATH)
    return answer.ended - began
