"""A request that a simulated gateway owns, with the clients that read it there."""

from collections.abc import Callable, Sequence
from typing import Protocol

from common.mesh.request_progress import CancelInMesh, RequestProgress
from common.ports.generation import GenerationRequest, TokenEvent
from common.simulation.worker_shape import MODEL
from common.values.errors import InvariantBroken, SegueError
from common.values.tokens import NewTokens


class StreamReader(Protocol):
    """What a request knows of a client: how far it is, and whether it still listens here."""

    accepted: bool
    reads: "StreamedRequest | None"
    lost_at: float | None
    tokens: dict[int, list[int]]
    ended_choices: set[int]
    cancelled_choices: set[int]

    def on_events(self, events: Sequence[TokenEvent]) -> None: ...
    def on_end(self, error: SegueError | None) -> None: ...


class StreamedRequest(RequestProgress):
    def __init__(self, request: GenerationRequest, *, cancel_in_mesh: CancelInMesh, clock: Callable[[], float]) -> None:
        super().__init__(request, MODEL, cancel_in_mesh=cancel_in_mesh, clock=clock)
        self.accepted = False
        self._readers: list[StreamReader] = []

    def was_accepted(self) -> None:
        if self.is_over or self.accepted:
            raise InvariantBroken("a request was accepted twice, or after its end")
        self.accepted = True
        for client in self._of_readers():
            client.accepted = True

    def join(self, client: StreamReader) -> None:
        """Read from where the client is."""
        self._readers.append(client)
        self.unread_since = None
        client.reads, client.lost_at = self, None
        for choice in range(len(self.choices)):
            self._show(client, choice)
        if self.is_over:
            client.on_end(self.error)

    def leave(self, client: StreamReader) -> None:
        """The server sees a connection's end."""
        self._readers.remove(client)
        self.nobody_reads()

    def nobody_reads(self) -> None:
        """Unless somebody does."""
        if not self._readers:
            self.unread(accepted=self.accepted)

    def deliver(self, choice: int, new: NewTokens) -> None:
        if self.is_over or not self.accepted:
            raise InvariantBroken("tokens after a request's end, or before it was accepted")
        super().deliver(choice, new)
        for client in self._of_readers():
            self._show(client, choice)

    def finish(self, error: SegueError | None) -> bool:
        if not super().finish(error):
            raise InvariantBroken("a request ended twice")
        for client in self._of_readers():
            client.on_end(self.error)
        return True

    def _of_readers(self) -> list[StreamReader]:
        """Those that still listen here: one that has gone elsewhere is noticed later."""
        return [client for client in self._readers if client.reads is self]

    def _show(self, client: StreamReader, choice: int) -> None:
        if choice not in client.ended_choices | client.cancelled_choices:
            client.on_events(self.choices[choice].events(choice, len(client.tokens[choice])))
