"""The record of one request at its gateway: which attempt, on which workers, and how far each choice is."""

from dataclasses import dataclass, field

from common.protocol.token_stream import TokenStream
from common.values.ids import ModelKey, RequestId, WorkerId
from common.values.sampling import SamplingParameters


@dataclass(slots=True, kw_only=True, eq=False)
class GatewayRequest:
    """`source[choice]` is the worker that is asked for missing tokens: where it was dispatched, then who emitted last.

    `involved` are all workers that may hold something of the present attempt. `losses` counts lost workers and `raises`
    all new attempts since the last new token. `waits_since` is set while no worker is there to take the request.
    """

    request_id: RequestId
    model: ModelKey
    prompt: tuple[int, ...]
    sampling: SamplingParameters
    salt: bytes
    streams: dict[int, TokenStream]
    deadline: float | None
    attempt: int = 0
    worker: WorkerId | None = None
    answered: bool = False
    accepted: bool = False
    source: dict[int, WorkerId] = field(default_factory=dict)
    heard_at: dict[int, float] = field(default_factory=dict)
    asked: set[int] = field(default_factory=set)
    unanswered: int = 0
    involved: set[WorkerId] = field(default_factory=set)
    avoid: set[WorkerId] = field(default_factory=set)
    losses: int = 0
    raises: int = 0
    waits_since: float | None = None

    def unfinished(self) -> list[TokenStream]:
        return [stream for stream in self.streams.values() if not stream.ended]
