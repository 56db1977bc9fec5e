"""What the gateway's HTTP side needs from the mesh: start a generation, read its tokens, cancel it. No text here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from common.protocol.request_record import IdempotencyMark
from common.values.ids import RequestId
from common.values.model_card import ModelCard
from common.values.request_account import RequestAccount
from common.values.request_class import WantedSpeed
from common.values.sampling import SamplingParameters
from common.values.tokens import Ending, PositionLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """`choices` is n. `body` is the normalised request, kept in the request record. `deadline_s` bounds the whole.

    `tenant` is a digest of the API key that asked: nobody else may come back to the request. `lingers`: it lives on for a
    while without a reader. `keep_prompt`: its answer shows the prompt, so the record keeps it beyond the end.
    """

    request_id: RequestId
    model: str
    prompt: tuple[int, ...]
    sampling: SamplingParameters
    choices: int = 1
    body: bytes = b""
    salt: bytes = b""
    deadline_s: float | None = None
    tenant: str = ""
    lingers: bool = False
    keep_prompt: bool = False
    idempotency: IdempotencyMark | None = None
    wanted: WantedSpeed = field(default_factory=WantedSpeed)


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One token of one choice, in order and gapless per choice: index 0, 1, 2, … `ending` comes with the last token, or
    alone (`token` None) where a sequence ends without one. `prompt_logprobs` comes with index 0 of choice 0."""

    choice: int
    index: int
    token: int | None = None
    logprobs: PositionLogprobs | None = None
    prompt_logprobs: tuple[PositionLogprobs, ...] | None = None
    ending: Ending | None = None


class Generation(Protocol):
    """A running request. Iterate until every choice has ended; then iteration stops by itself.

    Tokens wait here, at most `max_tokens` a choice, for as long as the reader is slow; nobody else waits for it.
    A failure of the whole request after its start raises RequestFailed from the iterator.
    """

    @property
    def request_id(self) -> RequestId: ...

    async def next_events(self) -> Sequence[TokenEvent]:
        """At least one event, as many as are there; an empty sequence once every choice has ended. Cancellation-safe:
        no event is lost when the awaiting task is cancelled or times out."""
        ...

    def cancel(self, choice: int | None = None) -> None:
        """End a choice (a stop string was matched), or all. Idempotent; its events stop at once."""
        ...

    async def close(self) -> None:
        """Release everything and record the end; cancels what still runs. Idempotent. Call it in a `finally`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    """A request that was found again, read from its first token on. Its prompt is empty once it has ended, unless it is kept."""

    request: GenerationRequest
    generation: Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTimeline:
    """What is known of an ended request: by which workers, at which attempt, and its moments in seconds since it was
    accepted (`prefill_started`, `first_token`, `transferred`, `decode_started`, `end`, as far as they are known).
    `account`: what it was promised and what it got."""

    state: str
    attempt: int
    worker: str | None
    decode_worker: str | None
    seconds: Mapping[str, float]
    account: RequestAccount | None = None


class MeshClient(Protocol):
    """The gateway's way into the mesh."""

    def cards(self) -> Sequence[ModelCard]:
        """The models that live workers serve now."""
        ...

    def card(self, name: str) -> ModelCard:
        """Raises ModelNotFound, naming the models there are."""
        ...

    def readiness(self) -> dict[str, str]:
        """What keeps the mesh from taking requests, by part ("broker": "not connected"); empty when ready."""
        ...

    async def start(self, request: GenerationRequest) -> Generation:
        """Returns once a worker has accepted. Raises RequestError or Unavailable."""
        ...

    async def attach(self, request_id: RequestId, tenant: str) -> Attached:
        """A running or ended request, wherever it runs: from another gateway it is taken over, and its readers there see it end
        with Moved. Raises StreamNotFound where there is none of this tenant, Unavailable."""
        ...

    async def timeline(self, request_id: RequestId, tenant: str) -> RequestTimeline:
        """Of a request that has ended within the last minutes; while it runs, there are no moments yet. Raises StreamNotFound
        where there is none of this tenant, StoreUnavailable."""
        ...

    async def claim(self, mark: IdempotencyMark, request_id: RequestId) -> RequestId:
        """The request that an idempotency key belongs to: this one where the key is new. Raises IdempotencyKeyReused where it
        came with another body, StoreUnavailable."""
        ...

    async def release(self, mark: IdempotencyMark, request_id: RequestId) -> None:
        """The request of a new key was not admitted after all."""
        ...
