"""The token events of one client request, whether its prompts are one request to the mesh or several.

One prompt, the usual case, is read straight from its generation. Several prompts are each read by a task of their own into
one bounded queue, so that none waits for another's tokens.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Protocol

from common.ports.generation import Generation, MeshClient, TokenEvent
from common.runtime.one_error import one_error
from common.values.errors import SegueError
from services.gateway.openai.plan import RequestPlan
from services.gateway.openai.plan_record import mesh_requests


class TokenSource(Protocol):
    async def next_events(self) -> tuple[int, Sequence[TokenEvent]]:
        """The place of a prompt, and events of its choices; no events once all prompts have ended."""
        ...

    def cancel(self, prompt: int, choice: int) -> None: ...

    def cancel_all(self) -> None: ...


class _OneGeneration:
    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    async def next_events(self) -> tuple[int, Sequence[TokenEvent]]:
        return 0, await self._generation.next_events()

    def cancel(self, prompt: int, choice: int) -> None:
        self._generation.cancel(choice)

    def cancel_all(self) -> None:
        self._generation.cancel()


Arrival = tuple[int, Sequence[TokenEvent]] | SegueError


class _SeveralGenerations:
    def __init__(self, generations: Sequence[Generation], arrivals: "asyncio.Queue[Arrival]") -> None:
        self._generations = generations
        self._arrivals = arrivals
        self._running = len(generations)

    async def next_events(self) -> tuple[int, Sequence[TokenEvent]]:
        while self._running:
            arrival = await self._arrivals.get()
            if isinstance(arrival, SegueError):
                raise arrival
            if arrival[1]:
                return arrival
            self._running -= 1
        return 0, ()

    def cancel(self, prompt: int, choice: int) -> None:
        self._generations[prompt].cancel(choice)

    def cancel_all(self) -> None:
        for generation in self._generations:
            generation.cancel()


@asynccontextmanager
async def token_source(mesh: MeshClient, plan: RequestPlan) -> AsyncIterator[TokenSource]:
    """Start the plan's requests; all are closed on the way out, however that is left. Raises what `start` raises; those that
    were started before one was refused are ended then."""
    async with AsyncExitStack() as stack:
        generations: list[Generation] = []
        try:
            for request in mesh_requests(plan):
                generation = await mesh.start(request)
                stack.push_async_callback(generation.close)
                generations.append(generation)
        except BaseException:
            for generation in generations:
                generation.cancel()
            raise
        yield await stack.enter_async_context(source_of(generations))


@asynccontextmanager
async def source_of(generations: Sequence[Generation]) -> AsyncIterator[TokenSource]:
    """Of requests that run already; closing them is the caller's."""
    if len(generations) == 1:
        yield _OneGeneration(generations[0])
        return
    arrivals: asyncio.Queue[Arrival] = asyncio.Queue(maxsize=len(generations))
    with one_error():
        async with asyncio.TaskGroup() as group:
            readers = [group.create_task(_read(place, generation, arrivals)) for place, generation in enumerate(generations)]
            try:
                yield _SeveralGenerations(generations, arrivals)
            finally:
                for reader in readers:
                    reader.cancel()


async def _read(place: int, generation: Generation, arrivals: "asyncio.Queue[Arrival]") -> None:
    try:
        while events := await generation.next_events():
            await arrivals.put((place, events))
        await arrivals.put((place, ()))
    except SegueError as error:
        await arrivals.put(error)
