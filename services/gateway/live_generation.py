"""A request that this gateway owns: all its tokens so far, and its readers.

The tokens are kept until the end, so that a client may come back, or a second one join, and read from the first token on.
They are bounded by `max_tokens` a choice, and a slow reader delays nobody.
"""

import asyncio
from collections.abc import Callable, Sequence

from common.mesh.request_progress import CancelInMesh, RequestProgress
from common.ports.generation import GenerationRequest, TokenEvent
from common.values.errors import SegueError
from common.values.ids import ModelKey, RequestId
from common.values.tokens import NewTokens


class OwnedRequest(RequestProgress):
    """With what waits for it here: who started it, until it is accepted, and who reads it."""

    def __init__(
        self, request: GenerationRequest, model: ModelKey, *, cancel_in_mesh: CancelInMesh, clock: Callable[[], float]
    ) -> None:
        super().__init__(request, model, cancel_in_mesh=cancel_in_mesh, clock=clock)
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._readers: list[LiveGeneration] = []

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
        if not self._readers:
            self.unread(accepted=self.accepted.done())

    def deliver(self, choice: int, new: NewTokens) -> None:
        super().deliver(choice, new)
        for reader in self._readers:
            reader.arrived(choice)

    def finish(self, error: SegueError | None) -> bool:
        if not super().finish(error):
            return False
        if not self.accepted.done():
            if error is not None:
                self.accepted.set_exception(error)
                self.accepted.exception()  # whoever started it may be gone
            else:
                self.accepted.set_result(None)
        for reader in self._readers:
            reader.ended()
        return True


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
