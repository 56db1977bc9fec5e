"""A request that this gateway owns: all its tokens so far, and its readers.

The tokens are kept until the end, so that a client may come back, or a second one join, and read from the first token on.
They are bounded by `max_tokens` a choice, and a slow reader delays nobody.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from common.ports.generation import GenerationRequest, TokenEvent
from common.values.errors import RequestFailed, SegueError
from common.values.ids import ModelKey, RequestId, WorkerId
from common.values.tokens import Ending, NewTokens, PositionLogprobs

CancelInMesh = Callable[[RequestId, int | None], None]


@dataclass(slots=True)
class ChoiceTokens:
    """`logprobs` is as long as `tokens` where they were asked for, else empty."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[PositionLogprobs, ...] | None = None
    ending: Ending | None = None

    def extend(self, new: NewTokens) -> None:
        self.tokens.extend(new.tokens)
        self.logprobs.extend(new.logprobs)
        self.prompt_logprobs = new.prompt_logprobs or self.prompt_logprobs
        self.ending = new.ending or self.ending

    def whole(self) -> NewTokens:
        return NewTokens(
            first=0,
            tokens=tuple(self.tokens),
            logprobs=tuple(self.logprobs),
            prompt_logprobs=self.prompt_logprobs,
            ending=self.ending,
        )

    def events(self, choice: int, first: int) -> list[TokenEvent]:
        """From token `first` on; an ending without a token of its own is an event of its own."""
        last = len(self.tokens) - 1
        events = [
            TokenEvent(
                choice=choice,
                index=index,
                token=self.tokens[index],
                logprobs=self.logprobs[index] if index < len(self.logprobs) else None,
                prompt_logprobs=self.prompt_logprobs if index == 0 else None,
                ending=self.ending if index == last else None,
            )
            for index in range(first, last + 1)
        ]
        if not events and self.ending is not None:
            return [TokenEvent(choice=choice, index=first, ending=self.ending)]
        return events


class OwnedRequest:
    """`cancel_in_mesh` ends a choice, or all. `epoch`, `attempt` and the workers are those of its record. `unread_since` is
    when the last reader of a request that lingers left."""

    def __init__(
        self,
        request: GenerationRequest,
        model: ModelKey,
        *,
        cancel_in_mesh: CancelInMesh,
        clock: Callable[[], float],
        epoch: int = 1,
        attempt: int = 0,
    ) -> None:
        self.request = request
        self.model = model
        self.epoch = epoch
        self.attempt = attempt
        self.worker: WorkerId | None = None
        self.decode_worker: str | None = None
        self.lingers = request.lingers
        self.choices = [ChoiceTokens() for _ in range(request.choices)]
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.started = clock()
        self.first_token: float | None = None
        self.unread_since: float | None = None
        self.is_recorded = False
        self.is_cancelled = False
        self.is_over = False
        self.error: SegueError | None = None
        self._cancel_in_mesh = cancel_in_mesh
        self._clock = clock
        self._readers: list[LiveGeneration] = []

    @property
    def request_id(self) -> RequestId:
        return self.request.request_id

    @property
    def tokens(self) -> int:
        return sum(len(choice.tokens) for choice in self.choices)

    def was_accepted(self) -> None:
        if not self.accepted.done():
            self.accepted.set_result(None)

    def read(self) -> "LiveGeneration":
        """A new reader, from the first token on."""
        reader = LiveGeneration(self)
        self._readers.append(reader)
        self.unread_since = None
        return reader

    def leave(self, reader: "LiveGeneration") -> None:
        """The last one to leave ends the request, or lets it linger."""
        if reader not in self._readers:
            return
        self._readers.remove(reader)
        if self._readers or self.is_over:
            return
        if self.lingers and self.accepted.done():
            self.unread_since = self._clock()
        else:
            self.cancel(None)

    def placed(self, attempt: int, worker: WorkerId, decode_worker: str | None) -> None:
        self.attempt, self.worker, self.decode_worker = attempt, worker, decode_worker

    def cancel(self, choice: int | None) -> None:
        if self.is_over:
            return
        self.is_cancelled = self.is_cancelled or choice is None
        self._cancel_in_mesh(self.request_id, choice)

    def deliver(self, choice: int, new: NewTokens) -> None:
        if self.first_token is None and new.tokens:
            self.first_token = self._clock()
        self.choices[choice].extend(new)
        for reader in self._readers:
            reader.arrived(choice)

    def finish(self, error: SegueError | None) -> None:
        """The one end; a second one changes nothing. Who still reads a cancelled request is told so."""
        if self.is_over:
            return
        self.is_over = True
        self.error = error
        if error is None and self.is_cancelled:
            self.error = RequestFailed("the request was cancelled", code="cancelled", status=409)
        if not self.accepted.done():
            if error is not None:
                self.accepted.set_exception(error)
                self.accepted.exception()  # whoever started it may be gone
            else:
                self.accepted.set_result(None)
        for reader in self._readers:
            reader.ended()


class LiveGeneration:
    """A Generation. Holds positions only: the tokens are the request's. `close` without `cancel` leaves a request that lingers
    running."""

    def __init__(self, owned: "OwnedRequest") -> None:
        self._owned = owned
        self._next = [0] * len(owned.choices)
        self._has_more = dict.fromkeys(choice for choice, known in enumerate(owned.choices) if known.tokens or known.ending)
        self._done: set[int] = set()
        self._arrived = asyncio.Event()
        self._is_closed = False

    @property
    def request_id(self) -> RequestId:
        return self._owned.request_id

    async def next_events(self) -> Sequence[TokenEvent]:
        while not self._is_closed:
            if self._has_more:
                return self._take()
            if self._owned.is_over:
                if self._owned.error is not None:
                    raise self._owned.error
                break
            self._arrived.clear()
            await self._arrived.wait()
        return []

    def _take(self) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        for choice in self._has_more:
            known = self._owned.choices[choice]
            events += known.events(choice, self._next[choice])
            self._next[choice] = len(known.tokens)
            if known.ending is not None:
                self._done.add(choice)
        self._has_more.clear()
        return events

    def cancel(self, choice: int | None = None) -> None:
        if self._is_closed:
            return
        if choice is None:
            self._close()
        else:
            self._done.add(choice)
            self._has_more.pop(choice, None)
        self._owned.cancel(choice)

    async def close(self) -> None:
        self._close()
        self._owned.leave(self)

    def _close(self) -> None:
        self._is_closed = True
        self._has_more.clear()
        self._arrived.set()

    def arrived(self, choice: int) -> None:
        if not self._is_closed and choice not in self._done:
            self._has_more[choice] = None
            self._arrived.set()

    def ended(self) -> None:
        self._arrived.set()
