"""A client of the simulated mesh, and the laws that it can see: its tokens are right, gapless and once; one end, with a cause."""

from dataclasses import dataclass, field

from common.mesh.gateway_effects import Deliver
from common.simulation.shadow_kv import logprob_of
from common.values.errors import InvariantBroken, SegueError
from common.values.ids import RequestId
from common.values.sampling import SamplingParameters


@dataclass(slots=True, kw_only=True, eq=False)
class SimulatedClient:
    """`expected` is what each choice makes alone; `attempt` is the present one.

    `cut`: its gateway died, so that it can see no more.
    """

    request_id: RequestId
    prompt: tuple[int, ...]
    sampling: SamplingParameters
    expected: dict[int, list[int]]
    started_at: float
    deadline: float | None = None
    attempt: int = 0
    tokens: dict[int, list[int]] = field(default_factory=dict)
    ended_choices: set[int] = field(default_factory=set)
    cancelled_choices: set[int] = field(default_factory=set)
    cancelled: bool = False
    cut: bool = False
    accepted: bool = False
    ends: int = 0
    error: SegueError | None = None
    heard_at: float | None = None
    longest_silence_s: float = 0.0

    @property
    def over(self) -> bool:
        return bool(self.ends) or self.cut

    def on_accepted(self) -> None:
        _require(not self.ends and not self.accepted, "a request was accepted twice, or after its end")
        self.accepted = True

    def on_tokens(self, effect: Deliver, now: float) -> None:
        choice, new = effect.choice, effect.new
        tokens = self.tokens.setdefault(choice, [])
        _require(self.accepted, "tokens of a request that nobody had accepted")
        _require(not self.ends, "tokens after a request's end")
        _require(choice not in self.cancelled_choices | self.ended_choices, "tokens after a choice's end")
        _require(new.first == len(tokens), f"token {new.first} where {len(tokens)} is next")
        tokens.extend(new.tokens)
        _require(tokens == self.expected[choice][: len(tokens)], "other tokens than without faults")
        positions = range(len(self.prompt) + new.first, len(self.prompt) + len(tokens))
        _require(new.logprobs == tuple(map(logprob_of, positions)), "log-probabilities of other tokens, or none")
        if self.sampling.prompt_logprobs is not None and choice == 0 and new.first == 0:
            wanted = tuple(logprob_of(position) for position in range(1, len(self.prompt)))
            _require(new.prompt_logprobs == wanted, "the prompt's log-probabilities are missing, or others")
        if new.ending is not None:
            _require(tokens == self.expected[choice], "a choice ended early")
            self.ended_choices.add(choice)
        self.longest_silence_s = max(self.longest_silence_s, now - (self.heard_at or now))
        self.heard_at = now

    def on_end(self, error: SegueError | None) -> None:
        self.ends += 1
        _require(self.ends == 1, "a request ended twice")
        self.error = error
        if error is None and not self.cancelled:
            for choice in self.expected:
                done = choice in self.cancelled_choices or choice in self.ended_choices
                _require(done, f"the request ended, choice {choice} did not")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise InvariantBroken(what)
