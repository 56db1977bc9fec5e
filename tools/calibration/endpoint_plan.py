"""What is sent to a server that is measured from outside: prompts alone, and bursts of streams whose answers end one by one.

Prompts alone give the line of prefill. In a burst the number of streams falls from its size to one, so a few bursts of different
contexts show steps of every number of rows, whatever the server does with requests that are broken off: none is.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tools.bench_load.arrivals import PlannedRequest

LENGTHS = (64, 128, 256, 384, 512, 768, 1024, 2048, 4096)
"""Of prompts alone."""
CONTEXTS = (64, 256, 768, 2048)
"""Of bursts; each has half as many streams as the one before."""
LEAST_OUTPUT = 48
MOST_OUTPUT = 400
"""Tokens of the answer that ends first: it should still run when the burst's last prompt is done. How long that takes, a first
request tells (Pace); without it the most is planned."""
STAGGER_TOKENS = 128
"""From the first answer's end to the last one's, and at least 8 tokens from one to the next."""
PACE_MARGIN = 1.3
LEAST_STREAMS = 2
LEAST_ROUNDS = 2
LEAST_POINTS = 3
"""Lengths of prompts, and numbers of streams: a line has as many coefficients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Of one request alone."""

    prompt_token_s: float
    answer_token_s: float

    def answer_tokens(self, streams: int, context: int) -> int:
        """That the first stream of a burst has made when the prompt of the last is done, if prompts do not hold it up."""
        tokens = streams * context * self.prompt_token_s / max(1e-9, self.answer_token_s)
        return round(min(MOST_OUTPUT, max(LEAST_OUTPUT, PACE_MARGIN * tokens)))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadGroup:
    """`alone`: one request after another; a burst: all at once. `name` tells its results apart from others'."""

    name: str
    kind: Literal["alone", "burst"]
    requests: tuple[PlannedRequest, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    groups: tuple[LoadGroup, ...]
    rounds: int

    @property
    def requests(self) -> int:
        return sum(len(group.requests) for group in self.groups)

    @property
    def prompt_tokens(self) -> int:
        return sum(request.prompt_tokens for group in self.groups for request in group.requests)

    @property
    def output_tokens(self) -> int:
        return sum(request.output_tokens for group in self.groups for request in group.requests)

    @property
    def most_at_once(self) -> int:
        return max((len(group.requests) for group in self.groups if group.kind == "burst"), default=1)


def load_plan(
    *, max_requests: int, max_concurrency: int, max_prompt: int, least_prompt: int, seed: int, pace: Pace | None = None
) -> LoadPlan | None:
    """As many rounds as the bound on requests allows; None where the bounds allow too little to fit a line. `least_prompt`: what a
    template takes, and a word. The order does not depend on the pace."""
    lengths = _lengths(LENGTHS, max_prompt, least_prompt)
    bursts = _bursts(max_concurrency, _lengths(CONTEXTS, max_prompt, least_prompt))
    numbers = sum(streams for streams, _ in bursts)
    if len(lengths) < LEAST_POINTS or numbers < LEAST_POINTS:
        return None
    rounds = max_requests // (len(lengths) + numbers)
    if rounds < LEAST_ROUNDS:
        return None
    rng = random.Random(seed)
    groups: list[LoadGroup] = []
    for _ in range(rounds):
        own = [*(_alone(length) for length in lengths), *(_burst(streams, context, pace) for streams, context in bursts)]
        rng.shuffle(own)
        groups += own
    return LoadPlan(groups=tuple(groups), rounds=rounds)


def least_requests(max_concurrency: int, max_prompt: int) -> int:
    """That a plan needs, without those that learn the server's words."""
    bursts = _bursts(max_concurrency, _lengths(CONTEXTS, max_prompt, 1))
    return LEAST_ROUNDS * (len(_lengths(LENGTHS, max_prompt, 1)) + sum(streams for streams, _ in bursts))


def _lengths(wanted: Sequence[int], most: int, least: int) -> list[int]:
    return sorted({max(least, length) for length in wanted if length <= most and least <= most})


def _bursts(max_concurrency: int, contexts: Sequence[int]) -> list[tuple[int, int]]:
    """(streams, context): all contexts where one stream at a time is allowed only."""
    found = []
    streams = max_concurrency
    for context in contexts:
        found.append((streams, context))
        streams = max(min(LEAST_STREAMS, max_concurrency), streams // 2)
    return found


def _alone(length: int) -> LoadGroup:
    return LoadGroup(name=f"prompt of {length}", kind="alone", requests=(_request(0, length, 1),))


def _burst(streams: int, context: int, pace: Pace | None) -> LoadGroup:
    """The first has the longest answer: servers that take prompts in turn begin with it."""
    least = MOST_OUTPUT if pace is None else pace.answer_tokens(streams, context)
    between = max(8, STAGGER_TOKENS // streams)
    requests = tuple(_request(place, context, least + between * (streams - 1 - place)) for place in range(streams))
    return LoadGroup(name=f"{streams} streams of {context}", kind="burst", requests=requests)


def _request(number: int, prompt_tokens: int, output_tokens: int) -> PlannedRequest:
    return PlannedRequest(
        number=number, at_s=0.0, kind="calibrate", prompt_tokens=prompt_tokens, output_tokens=output_tokens, measured=True
    )
