"""The record of one request at its gateway: which attempt, on which workers, and how far each choice is."""

from collections import Counter
from dataclasses import dataclass, field

from common.mesh.suspicion import Suspicion
from common.protocol.token_stream import TokenStream
from common.values.ids import Incarnation, ModelKey, RequestId, WorkerId
from common.values.objectives import Objectives, Speed
from common.values.request_class import WantedSpeed
from common.values.sampling import SamplingParameters


@dataclass(slots=True, kw_only=True, eq=False)
class GatewayRequest:
    """`source[choice]` is the worker that is asked for missing tokens: where it was dispatched, then who emitted last.

    `involved` are all workers that may hold something of the present attempt, `incarnations` theirs when they came to. `answered`
    once the dispatch is: from then on the request is probed. `asked` are the choices with a probe under way, `unanswered`
    counts probes by worker. `raises` counts new attempts since the last new token; after any but those for want of room its choices
    stay `together`. While nobody takes the request it is placed again at `retry_at`; `waits_since` is when that began, until a
    worker has accepted. `epoch` rises with every change of the owning gateway.

    `objectives` follow from what is `wanted` and the mesh's speed, once a worker is known; `unloaded_s` is what the prompt takes on an
    idle worker. `placement` says of which kind the present one is. Of one that is adopted the first times are not known here.
    """

    request_id: RequestId
    model: ModelKey
    prompt: tuple[int, ...]
    sampling: SamplingParameters
    salt: bytes
    streams: dict[int, TokenStream]
    deadline: float | None
    epoch: int = 1
    attempt: int = 0
    worker: WorkerId | None = None
    answered: bool = False
    accepted: bool = False
    source: dict[int, WorkerId] = field(default_factory=dict)
    heard_at: dict[int, float] = field(default_factory=dict)
    asked: set[int] = field(default_factory=set)
    unanswered: Counter[WorkerId] = field(default_factory=Counter)
    involved: set[WorkerId] = field(default_factory=set)
    avoid: set[WorkerId] = field(default_factory=set)
    incarnations: dict[WorkerId, Incarnation] = field(default_factory=dict)
    suspicion: Suspicion = field(default_factory=Suspicion)
    raises: int = 0
    together: bool = False
    waits_since: float | None = None
    retry_at: float | None = None
    wanted: WantedSpeed = field(default_factory=WantedSpeed)
    objectives: Objectives | None = None
    unloaded_s: float = 0.0
    predicted: Speed | None = None
    best_effort: bool = False
    gives_way: bool = False
    placement: str = ""
    started_at: float = 0.0
    first_token_at: float | None = None
    last_token_at: float | None = None
    is_adopted: bool = False
    stages: dict[str, float] = field(default_factory=dict)

    def involve(self, worker: WorkerId, incarnation: Incarnation | None) -> None:
        """A worker came to have something of this attempt."""
        self.involved.add(worker)
        if incarnation is not None:
            self.incarnations[worker] = incarnation

    def unfinished(self) -> list[TokenStream]:
        return [stream for stream in self.streams.values() if not stream.ended]
