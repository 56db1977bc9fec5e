"""One client request while it runs: token events in, text events out, each stamped and counted."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from common.ports.generation import Generation, MeshClient
from common.values.errors import RequestFailed
from common.values.tokens import PositionLogprobs
from services.gateway.gateway_metrics import GatewayMetrics, Outcome, RequestObserver
from services.gateway.openai.plan import RequestPlan
from services.gateway.openai.usage import Usage
from services.gateway.text.choice_text import TextEvent
from services.gateway.token_source import TokenSource, source_of, token_source


class TextGeneration:
    """Read `next_events` until it returns None; by then every choice has finished."""

    def __init__(self, plan: RequestPlan, source: TokenSource, observer: RequestObserver | None) -> None:
        self._plan = plan
        self._source = source
        self._observer = observer
        self._choices = [plan.choice_text(choice) for choice in range(plan.choices)]
        self._unfinished = plan.choices
        self.prompt_positions: list[Sequence[PositionLogprobs] | None] = [None] * len(plan.prompts)

    def cancel(self) -> None:
        """Nobody wants any more of it, now or later."""
        self._source.cancel_all()

    @property
    def finished(self) -> bool:
        return self._unfinished == 0

    @property
    def usage(self) -> Usage:
        return Usage.of(prompt=self._plan.prompt_tokens, completion=sum(choice.consumed for choice in self._choices))

    async def next_events(self) -> list[TextEvent] | None:
        """The text events of the tokens that have arrived, perhaps none yet; None once all choices have finished.

        Raises RequestFailed where the request or one of its choices failed.
        """
        if self.finished:
            return None
        prompt, arrived = await self._source.next_events()
        if not arrived:
            raise RequestFailed("the mesh ended the request before its choices had ended")
        now = time.monotonic()
        events: list[TextEvent] = []
        for token_event in arrived:
            if token_event.prompt_logprobs is not None:
                self.prompt_positions[prompt] = token_event.prompt_logprobs
            place = prompt * self._plan.n + token_event.choice
            choice = self._choices[place]
            if choice.finish is not None:
                continue
            if token_event.token is not None and self._observer is not None:
                self._observer.token(place, now)
            event = choice.feed(token_event)
            if event is None:
                continue
            events.append(event)
            if event.finish is not None:
                self._unfinished -= 1
                if choice.stopped_early and token_event.ending is None:
                    self._source.cancel(prompt, token_event.choice)
        return events


@asynccontextmanager
async def text_generation(
    mesh: MeshClient, plan: RequestPlan, metrics: GatewayMetrics, *, arrived: float
) -> AsyncIterator[TextGeneration]:
    """Admit and run a request; on the way out everything is released and the end counted. `arrived` is monotonic time."""
    observer = RequestObserver(metrics, model=plan.model, kind=plan.kind, arrived=arrived, choices=plan.choices)
    outcome: Outcome = "rejected"
    try:
        async with token_source(mesh, plan) as source:
            outcome = "failed"
            observer.admitted(plan.prompt_tokens)
            try:
                generation = TextGeneration(plan, source, observer)
                yield generation
                outcome = "finished" if generation.finished else "cancelled"
            finally:
                observer.released()
    except (asyncio.CancelledError, GeneratorExit):
        outcome = "cancelled"
        raise
    finally:
        observer.ended(outcome, time.monotonic())


@asynccontextmanager
async def resumed_generation(plan: RequestPlan, generations: Sequence[Generation]) -> AsyncIterator[TextGeneration]:
    """Read a request again from its beginning; whoever started it counted it. The generations are the caller's to close."""
    async with source_of(generations) as source:
        yield TextGeneration(plan, source, None)
