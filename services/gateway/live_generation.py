"""A running request as its HTTP handler sees it: the tokens that came, waiting until they are read."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from common.ports.generation import TokenEvent
from common.values.errors import SegueError
from common.values.ids import RequestId
from common.values.tokens import NewTokens


class LiveGeneration:
    """Holds at most `max_tokens` events a choice: a slow reader delays nobody. `cancel_in_mesh` ends a choice, or all."""

    def __init__(self, request_id: RequestId, cancel_in_mesh: Callable[[RequestId, int | None], None], started: float) -> None:
        self._request_id = request_id
        self._cancel_in_mesh = cancel_in_mesh
        self._events: deque[TokenEvent] = deque()
        self._arrived = asyncio.Event()
        self._cancelled: set[int] = set()
        self._ended = False
        self._error: SegueError | None = None
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.started = started
        self.first_token: float | None = None
        self.tokens = 0

    @property
    def request_id(self) -> RequestId:
        return self._request_id

    async def next_events(self) -> Sequence[TokenEvent]:
        while not self._events and not self._ended:
            self._arrived.clear()
            await self._arrived.wait()
        if not self._events and self._error is not None:
            raise self._error
        events, self._events = list(self._events), deque()
        return events

    def cancel(self, choice: int | None = None) -> None:
        if self._ended:
            return
        if choice is None:
            self._events.clear()
        else:
            self._cancelled.add(choice)
            self._events = deque(event for event in self._events if event.choice != choice)
        self._cancel_in_mesh(self._request_id, choice)

    async def close(self) -> None:
        self.cancel()

    def deliver(self, choice: int, new: NewTokens, now: float) -> None:
        if choice in self._cancelled:
            return
        if self.first_token is None and new.tokens:
            self.first_token = now
        self.tokens += len(new.tokens)
        self._events.extend(_events_of(choice, new))
        self._arrived.set()

    def finish(self, error: SegueError | None) -> None:
        """The one end; a second one changes nothing."""
        if self._ended:
            return
        self._ended = True
        self._error = error
        if not self.accepted.done():
            if error is not None:
                self.accepted.set_exception(error)
            else:
                self.accepted.set_result(None)
        self._arrived.set()


def _events_of(choice: int, new: NewTokens) -> list[TokenEvent]:
    last = len(new.tokens) - 1
    events = [
        TokenEvent(
            choice=choice,
            index=new.first + i,
            token=token,
            logprobs=new.logprobs[i] if i < len(new.logprobs) else None,
            prompt_logprobs=new.prompt_logprobs if new.first + i == 0 else None,
            ending=new.ending if i == last else None,
        )
        for i, token in enumerate(new.tokens)
    ]
    return events or [TokenEvent(choice=choice, index=new.first, ending=new.ending)]
