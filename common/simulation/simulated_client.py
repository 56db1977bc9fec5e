"""A client of the simulated mesh, and the laws that it can see: its tokens are right, gapless and once; one end, with a cause.

Whatever happens to its gateway, it comes back at any gateway with the last token that it has kept, and goes on from there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from common.ports.generation import TokenEvent
from common.simulation.shadow_kv import logprob_of
from common.simulation.simulated_process import SimulatedProcess
from common.simulation.streamed_request import StreamedRequest
from common.values.errors import InvariantBroken, Moved, SegueError
from common.values.ids import RequestId
from common.values.sampling import SamplingParameters


@dataclass(slots=True, kw_only=True, eq=False)
class SimulatedClient:
    """`expected` is what each choice makes alone; `reads` is what it listens to now, `at` the gateway that it is connected to.

    `come_back` is called where its connection ended before the request did. `cut`: it never comes back, or its gateway died
    before it knew of its request. `left_at` is when it left a gateway that had fallen silent, until it is served again.
    `connections` counts: what is answered to an earlier one reaches nobody.
    """

    request_id: RequestId
    prompt: tuple[int, ...]
    sampling: SamplingParameters
    expected: dict[int, list[int]]
    come_back: Callable[["SimulatedClient"], None]
    deadline_s: float | None = None
    lingers: bool = False
    tokens: dict[int, list[int]] = field(default_factory=dict)
    ended_choices: set[int] = field(default_factory=set)
    cancelled_choices: set[int] = field(default_factory=set)
    reads: StreamedRequest | None = None
    at: SimulatedProcess | None = None
    cancelled: bool = False
    cut: bool = False
    accepted: bool = False
    left_at: float | None = None
    lost_at: float | None = None
    connections: int = 0
    resumes: int = 0
    ends: int = 0
    error: SegueError | None = None

    def __post_init__(self) -> None:
        self.tokens = {choice: [] for choice in self.expected}

    @property
    def over(self) -> bool:
        return bool(self.ends) or self.cut

    def on_events(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            self._on_event(event)

    def _on_event(self, event: TokenEvent) -> None:
        choice, tokens = event.choice, self.tokens[event.choice]
        _require(not self.ends, "tokens after a request's end")
        _require(choice not in self.cancelled_choices | self.ended_choices, "tokens after a choice's end")
        _require(event.index == len(tokens), f"token {event.index} where {len(tokens)} is next")
        if event.token is not None:
            tokens.append(event.token)
            _require(tokens == self.expected[choice][: len(tokens)], "other tokens than without faults")
            score = None if self.sampling.logprobs is None else logprob_of(len(self.prompt) + event.index)
            _require(event.logprobs == score, "log-probabilities of other tokens, or none")
            if self.sampling.prompt_logprobs is not None and choice == 0 and event.index == 0:
                wanted = tuple(logprob_of(position) for position in range(1, len(self.prompt)))
                _require((event.prompt_logprobs or ()) == wanted, "the prompt's log-probabilities are missing, or others")
        if event.ending is not None:
            _require(tokens == self.expected[choice], "a choice ended early")
            self.ended_choices.add(choice)

    def on_end(self, error: SegueError | None) -> None:
        if isinstance(error, Moved):
            self.disconnected()
            return
        self.ends += 1
        _require(self.ends == 1, "a request ended twice")
        self.error = error
        if error is None and not self.cancelled:
            for choice in self.expected:
                done = choice in self.cancelled_choices or choice in self.ended_choices
                _require(done, f"the request ended, choice {choice} did not")

    def disconnected(self) -> None:
        """The connection ended before the request did, or before the client was served."""
        self.reads = self.at = None
        if self.over:
            return
        if not self.accepted:
            self.cut = True
        else:
            self.come_back(self)

    def forget_after(self, choice: int, kept: int) -> None:
        """It comes back with an earlier id than it could."""
        del self.tokens[choice][kept:]
        self.ended_choices.discard(choice)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise InvariantBroken(what)
